// SPDX-License-Identifier: GPL-2.0-only
// Hashes and times direct and buffered reads of the listed files, for a host that watches the CPU
// time.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <xxhash.h>

#include "io.hpp"
#include "trace.hpp"

namespace fs = std::filesystem;
using Json = nlohmann::json;

namespace
{

struct Listed {
	std::string name;
	size_t size;
	std::string hash;
	size_t timed;
};

std::vector<Listed> read_list(const fs::path &path)
{
	std::vector<Listed> files;
	std::ifstream in(path);
	for (const auto &item : Json::parse(in))
		files.push_back(
			{item.at("name"), item.at("size"), item.at("xxh3_128"), item.at("timed")});
	return files;
}

void report(const Json &row)
{
	std::cout << "@json " + row.dump() + "\n" << std::flush;
}

// The host answers when it has noted the CPU time that the whole guest used so far.
void meet_host()
{
	std::string answer;
	std::cout << "@cpu\n" << std::flush;
	if (!std::getline(std::cin, answer))
		throw Error("stdin", 0, "an answer to @cpu", "end of file");
}

class Reader
{
public:
	Reader(std::string device, fs::path mount, size_t request)
	    : device_(std::move(device)), mount_(std::move(mount)), buffer_(request)
	{
		std::ranges::fill(buffer_.bytes(), std::byte{1});
	}

	Mount mount() const { return Mount(device_, mount_); }

	template <typename Use>
	size_t read(const Listed &file, size_t bytes, int flags, Use use) const
	{
		const auto path = mount_ / file.name;
		const Fd fd(path, O_RDONLY | flags);
		if (const auto size = file_size(fd); size != file.size)
			throw Error(path.string(), 0, std::to_string(file.size) + " bytes in all",
				    std::to_string(size));
		size_t done = 0;
		while (done < bytes) {
			const auto got = ::read(fd, buffer_.bytes().data(), buffer_.bytes().size());
			if (got <= 0)
				throw Error(path.string(), static_cast<off_t>(done),
					    std::to_string(bytes) + " bytes",
					    got ? errno_text(errno) : "end of file");
			use(buffer_.bytes().first(static_cast<size_t>(got)));
			done += static_cast<size_t>(got);
		}
		return done;
	}

	std::string hash(const Listed &file, int flags) const
	{
		const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(
			XXH3_createState(), XXH3_freeState);
		XXH3_128bits_reset(state.get());
		read(file, file.size, flags, [&](std::span<const std::byte> data) {
			XXH3_128bits_update(state.get(), data.data(), data.size());
		});
		const auto value = XXH3_128bits_digest(state.get());
		std::array<char, 33> text;
		std::snprintf(text.data(), text.size(), "%016llx%016llx",
			      static_cast<unsigned long long>(value.high64),
			      static_cast<unsigned long long>(value.low64));
		return text.data();
	}

	size_t cached(const Listed &file) const
	{
		return cached_pages(Fd(mount_ / file.name, O_RDONLY));
	}

private:
	std::string device_;
	fs::path mount_;
	Mapping buffer_;
};

const char *mode_name(int flags)
{
	return flags & O_DIRECT ? "direct" : "buffered";
}

size_t total_cached(const Reader &reader, const std::vector<Listed> &files)
{
	size_t pages = 0;
	for (const auto &file : files)
		pages += reader.cached(file);
	return pages;
}

void verify(const Reader &reader, const std::vector<Listed> &files, int flags)
{
	const auto mount = reader.mount();
	const PathTrace others("path != 0");
	PathTrace::forget();
	auto wrong = Json::array();
	for (const auto &file : files)
		if (const auto hash = reader.hash(file, flags); hash != file.hash)
			wrong.push_back(
				{{"name", file.name}, {"expected", file.hash}, {"got", hash}});
	report({{"verify", mode_name(flags)},
		{"files", files.size()},
		{"wrong", wrong},
		{"not_direct", PathTrace::all().size()},
		{"pages", total_cached(reader, files)}});
}

void time_pass(const Reader &reader, const std::vector<Listed> &files, int flags)
{
	using Clock = std::chrono::steady_clock;
	const auto mount = reader.mount();
	meet_host();
	size_t bytes = 0;
	const auto start = Clock::now();
	for (const auto &file : files)
		if (file.timed)
			bytes += reader.read(file, file.timed, flags, [](auto) {});
	const std::chrono::duration<double> seconds = Clock::now() - start;
	meet_host();
	report({{"pass", mode_name(flags)},
		{"bytes", bytes},
		{"seconds", seconds.count()},
		{"pages", total_cached(reader, files)}});
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Times direct and buffered reads of an EROFS image"};
	std::string device, mount, list;
	size_t request = 1 << 20;
	unsigned rounds = 5;
	app.add_option("--device", device, "block device with the image")->required();
	app.add_option("--mount", mount, "where to mount it, again for each pass")->required();
	app.add_option("--list", list, "JSON list of name, size, xxh3_128, timed")->required();
	app.add_option("--request", request, "bytes per read");
	app.add_option("--rounds", rounds, "direct and buffered passes, each");
	CLI11_PARSE(app, argc, argv);
	try {
		const auto files = read_list(list);
		const Reader reader(device, mount, request);
		for (const int flags : {O_DIRECT, 0})
			verify(reader, files, flags);
		for (unsigned round = 0; round < rounds; ++round)
			for (const int flags : {O_DIRECT, 0})
				time_pass(reader, files, round % 2 ? flags ^ O_DIRECT : flags);
		return 0;
	} catch (const std::exception &error) {
		std::cout << "@json " + Json({{"error", error.what()}}).dump() + "\n" << std::flush;
		return 1;
	}
}
