// SPDX-License-Identifier: GPL-2.0-only
// What the kernel tells of the reads it has served.
#pragma once

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "io.hpp"

// What the kernel tells of one kind of event.
class EventTrace
{
public:
	static bool available(std::string_view event)
	{
		return std::filesystem::exists(top() / "events" / event / "enable");
	}
	// The trace has room for thousands of events only: leave out what is of no interest.
	explicit EventTrace(std::string_view event, const std::string &filter = "0")
	    : event_(top() / "events" / event)
	{
		if (!available(event))
			throw Error(event, 0, "an event of the kernel", "none");
		write_text(event_ / "filter", filter);
		write_text(event_ / "enable", "1");
	}
	EventTrace(const EventTrace &) = delete;
	EventTrace &operator=(const EventTrace &) = delete;
	~EventTrace()
	{
		std::ofstream(event_ / "enable") << 0;
		std::ofstream(event_ / "filter") << 0;
	}

	static void forget() { std::ofstream(top() / "trace", std::ios::trunc); }
	static std::vector<std::string> lines(std::string_view with)
	{
		std::ifstream trace(top() / "trace");
		std::vector<std::string> found;
		for (std::string line; std::getline(trace, line);)
			if (line.find(with) != line.npos)
				found.push_back(line);
		return found;
	}
	// There was no room for all of them.
	static bool lost()
	{
		for (const auto &cpu : std::filesystem::directory_iterator(top() / "per_cpu")) {
			std::ifstream stats(cpu.path() / "stats");
			for (std::string line; std::getline(stats, line);)
				if (line.starts_with("overrun:") && number(line, "overrun: "))
					return true;
		}
		return false;
	}
	static uint64_t number(const std::string &line, std::string_view name)
	{
		const auto at = line.find(name);
		if (at == line.npos)
			throw Error("trace", 0, "a number" + std::string(name), line);
		return std::stoull(line.substr(at + name.size()), nullptr, 0);
	}
	static std::filesystem::path top() { return "/sys/kernel/tracing"; }

private:
	std::filesystem::path event_;
};

// How the kernel says that it has served requests.
class PathTrace : public EventTrace
{
public:
	explicit PathTrace(const std::string &filter = "0") : EventTrace(kEvent, filter) {}

	static bool offered() { return available(kEvent); }
	static std::vector<std::string> all() { return lines(" erofs_dio_read: "); }
	static std::set<std::string> taken()
	{
		std::set<std::string> paths;
		for (const auto &line : all())
			paths.insert(line.substr(line.rfind(' ') + 1));
		return paths;
	}
	// To be printed.
	static std::string text(const std::set<std::string> &paths)
	{
		std::string all;
		for (const auto &path : paths)
			all += (all.empty() ? "" : "+") + path;
		return all.empty() ? "no event" : all;
	}

private:
	static constexpr std::string_view kEvent = "erofs/erofs_dio_read";
};
