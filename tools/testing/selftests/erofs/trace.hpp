// SPDX-License-Identifier: GPL-2.0-only
// What the kernel tells of the reads it has served.
#pragma once

#include <filesystem>
#include <fstream>
#include <set>
#include <string>

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
