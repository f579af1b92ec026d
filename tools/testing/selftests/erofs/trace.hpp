// SPDX-License-Identifier: GPL-2.0-only
// What the kernel tells of the reads it has served, and of the pages it holds for them.
#pragma once

#include <chrono>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <string>
#include <thread>

#include "io.hpp"

// How the kernel says that it has served requests.
class PathTrace
{
public:
	static bool available() { return std::filesystem::exists(event() / "enable"); }
	// The trace has room for thousands of reads only: leave out what is of no interest.
	explicit PathTrace(const std::string &filter = "0")
	{
		std::ofstream(event() / "filter") << filter;
		std::ofstream(event() / "enable") << 1;
	}
	PathTrace(const PathTrace &) = delete;
	PathTrace &operator=(const PathTrace &) = delete;
	~PathTrace()
	{
		std::ofstream(event() / "enable") << 0;
		std::ofstream(event() / "filter") << 0;
	}

	static void forget() { std::ofstream(top() / "trace", std::ios::trunc); }
	static std::set<std::string> taken()
	{
		std::ifstream trace(top() / "trace");
		std::set<std::string> paths;
		for (std::string line; std::getline(trace, line);)
			if (line.find(" erofs_dio_read: ") != line.npos)
				paths.insert(line.substr(line.rfind(' ') + 1));
		return paths;
	}

private:
	static std::filesystem::path top() { return "/sys/kernel/tracing"; }
	static std::filesystem::path event() { return top() / "events/erofs/erofs_dio_read"; }
};

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

// Such kernels hold freed memory back and keep records; they look for leaks themselves.
inline bool keeps_freed_memory()
{
	return std::filesystem::exists("/sys/kernel/debug/kmemleak");
}

// What misaligned reads have left in the page cache is not lost, nor what each processor keeps.
inline size_t free_pages(bool with_caches = true)
{
	if (with_caches)
		std::ofstream("/proc/sys/vm/drop_caches") << 3 << std::flush;
	std::ofstream("/proc/sys/vm/stat_refresh") << 1 << std::flush;
	size_t sum = 0, value = 0;
	std::ifstream zones("/proc/zoneinfo");
	for (std::string name; with_caches && zones >> name;)
		if (name == "count:" && zones >> value)
			sum += value;
	std::ifstream in("/proc/vmstat");
	for (std::string name; in >> name >> value;)
		if (name == "nr_free_pages")
			return sum + value;
	throw Error("/proc/vmstat", 0, "nr_free_pages", "none");
}
