// SPDX-License-Identifier: GPL-2.0-only
// What reads have to give back: pinned pages and memory.
#pragma once

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <string>
#include <thread>

#include <malloc.h>

#include "io.hpp"
#include "ktap.hpp"

// Pages pinned and unpinned since boot; nothing, if the kernel does not count them.
struct Pins {
	long acquired = -1, released = -1;

	long held() const { return acquired - released; }
	static std::optional<Pins> now()
	{
		// counts are kept per processor until somebody asks
		std::ofstream("/proc/sys/vm/stat_refresh") << 1 << std::flush;
		std::ifstream in("/proc/vmstat");
		Pins pins;
		long value = 0;
		for (std::string name; in >> name >> value;) {
			if (name == "nr_foll_pin_acquired")
				pins.acquired = value;
			else if (name == "nr_foll_pin_released")
				pins.released = value;
		}
		if (pins.acquired < 0 || pins.released < 0)
			return {};
		return pins;
	}
	// Rings are taken apart by a worker of the kernel: wait for it, but not forever.
	static std::optional<Pins> settled()
	{
		auto pins = now();
		for (int i = 0; i < 100 && pins && pins->held(); ++i, pins = now())
			std::this_thread::sleep_for(std::chrono::milliseconds(50));
		return pins;
	}
};

// When no read is under way. A reason to skip, or nothing.
inline std::optional<std::string> pins_released()
{
	const auto pins = Pins::settled();
	if (!pins)
		return "/proc/vmstat does not count pins";
	if (!pins->acquired)
		throw Error("nr_foll_pin_acquired", 0, "pinned pages", "none");
	if (pins->held())
		throw Error("nr_foll_pin_released", 0, std::to_string(pins->acquired),
			    std::to_string(pins->released));
	return {};
}

// Such kernels hold freed memory back and keep records; they look for leaks themselves.
inline bool keeps_freed_memory()
{
	return std::filesystem::exists("/sys/kernel/debug/kmemleak");
}

// Pages that are free, this program's own (its allocator keeps what threads have freed), kept by a
// processor, or taken by tasks: as many workers as have ever been busy at once stay for minutes.
inline long pages_left()
{
	const long page = ::sysconf(_SC_PAGESIZE);
	::malloc_trim(0);
	std::ofstream("/proc/sys/vm/drop_caches") << 3 << std::flush;
	std::ofstream("/proc/sys/vm/stat_refresh") << 1 << std::flush;
	long size = 0, sum = 0, value = 0;
	std::ifstream("/proc/self/statm") >> size >> sum;
	std::ifstream zones("/proc/zoneinfo"), all("/proc/vmstat");
	std::string name;
	while (zones >> name)
		if (name == "count:" && zones >> value)
			sum += value;
	while (all >> name >> value) {
		if (name == "nr_free_pages")
			sum += value;
		// in KiB; what else there is of a task takes half as much as its stack
		else if (name == "nr_kernel_stack")
			sum += value * 1024 / page * 3 / 2;
	}
	return sum;
}

// A round returns how many reads it has made. A leak takes pages in most rounds; whatever else
// takes or gives back some does not.
inline void expect_no_leak(const std::function<size_t()> &round)
{
	if (keeps_freed_memory()) {
		round();
		return;
	}
	constexpr int kRounds = 8;
	constexpr long kReadsPerPage = 8;
	long most = 0;
	int leaking = 0;
	bool steady = false;
	std::string losses;
	for (int i = 0; i < kRounds && !steady; ++i) {
		Pins::settled();
		const auto before = pages_left();
		const auto reads = round();
		Pins::settled();
		const auto lost = before - pages_left();
		most = static_cast<long>(reads) / kReadsPerPage;
		losses += ' ' + std::to_string(lost);
		leaking += lost > most;
		steady = std::labs(lost) <= most;
	}
	ktap::line("    # pages lost per round:" + losses);
	if (!steady && leaking > kRounds / 2)
		throw Error("memory", 0,
			    "a round that takes no more than " + std::to_string(most) + " pages",
			    "rounds that take" + losses);
}
