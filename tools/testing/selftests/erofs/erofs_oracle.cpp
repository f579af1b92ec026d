// SPDX-License-Identifier: GPL-2.0-only
// Shows what an EROFS image contains, or compares it with a directory, without the kernel.

#include <algorithm>
#include <cstdio>
#include <iostream>

#include <CLI/CLI.hpp>

#include "image.hpp"
#include "io.hpp"
#include "ktap.hpp"
#include "target.hpp"

namespace fs = std::filesystem;

namespace
{

constexpr uint64_t step = 4 << 20;

erofs::Entry find(const erofs::Image &image, const fs::path &path)
{
	for (auto &entry : image.files())
		if (entry.path == path.relative_path())
			return entry;
	throw Error(path.string(), 0, "a regular file of the image", "none");
}

template <typename Use>
void for_each_part(const erofs::Image &image, const erofs::Entry &entry, Use use)
{
	for (uint64_t at = 0; at < entry.size; at += step)
		use(at, image.read(entry, at, std::min(step, entry.size - at)));
}

void list(const erofs::Image &image)
{
	std::printf("%18s %14s %-10s %s\n", "nid", "size", "", "path");
	for (const auto &entry : image.files())
		std::printf("%#18jx %14ju %-10s %s\n", uintmax_t{entry.nid}, uintmax_t{entry.size},
			    entry.compressed ? "compressed" : "plain", entry.path.c_str());
}

std::string flags(const erofs::Extent &extent)
{
	std::string text;
	const auto add = [&](bool set, std::string_view name) {
		if (set)
			text.append(" ").append(name);
	};
	add(extent.meta, "inline");
	add(extent.partial, "partial");
	add(extent.device, "device " + std::to_string(extent.device));
	return text;
}

void show_extents(const erofs::Image &image, const fs::path &path)
{
	std::printf("%14s %10s %14s %10s how\n", "la", "llen", "pa", "plen");
	for (const auto &extent : image.extents(find(image, path))) {
		const auto how = extent.fragment ? "fragment"
				 : extent.mapped ? erofs::name(extent.algorithm)
						 : "hole";
		std::printf("%14ju %10ju %14ju %10ju %s%s\n", uintmax_t{extent.la},
			    uintmax_t{extent.llen}, uintmax_t{extent.pa}, uintmax_t{extent.plen},
			    std::string(how).c_str(), flags(extent).c_str());
	}
}

void write_content(const erofs::Image &image, const fs::path &path)
{
	for_each_part(image, find(image, path), [&](uint64_t, std::span<const std::byte> part) {
		std::cout.write(reinterpret_cast<const char *>(part.data()),
				static_cast<std::streamsize>(part.size()));
	});
	if (!std::cout.flush())
		throw Error("standard output", 0, "a successful write", "an error");
}

void compare_file(const erofs::Image &image, const erofs::Entry &entry, const fs::path &truth)
{
	const Fd fd(truth / entry.path, O_RDONLY);
	if (const auto size = file_size(fd); size != entry.size)
		throw Error(entry.path.string(), 0, std::to_string(size) + " bytes in all",
			    std::to_string(entry.size));
	for_each_part(image, entry, [&](uint64_t at, std::span<const std::byte> part) {
		expect_bytes(entry.path, at, slurp(truth / entry.path, fd, at, part.size()), part);
	});
}

// All files are compared, so that one that is wrong hides no other.
void compare(const erofs::Image &image, const fs::path &truth)
{
	const auto files = image.files();
	const auto expected = regular_files(truth);
	std::vector<std::string> wrong;
	for (const auto &path : expected)
		if (!std::ranges::binary_search(files, path, {}, &erofs::Entry::path))
			wrong.push_back(path.string() + ": not in the image");
	for (const auto &entry : files) {
		try {
			if (std::ranges::binary_search(expected, entry.path))
				compare_file(image, entry, truth);
			else
				wrong.push_back(entry.path.string() + ": only in the image");
		} catch (const std::exception &error) {
			wrong.push_back(error.what());
		}
	}
	if (files.empty() && expected.empty())
		wrong.push_back(truth.string() + ": no file to compare");
	if (wrong.empty())
		return;
	std::string text = std::to_string(wrong.size()) + " wrong of " +
			   std::to_string(expected.size()) + " files";
	for (size_t i = 0; i < wrong.size() && i < 5; ++i)
		text += "; " + wrong[i];
	throw std::runtime_error(text);
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Shows what an EROFS image contains, or compares it with a directory"};
	fs::path file, truth, extents, cat;
	std::vector<fs::path> devices;
	std::string name;
	bool listing = false;
	app.add_option("--image", file, "image file or block device")->required();
	app.add_option("--device", devices, "extra device, in the order of the device table")
		->take_all()
		->expected(1);
	auto *what = app.add_option_group("what");
	what->require_option(1);
	auto *compared = what->add_option("--truth", truth, "compare all regular files with DIR");
	what->add_flag("--list", listing, "all regular files");
	what->add_option("--extents", extents, "how the file PATH of the image is stored");
	what->add_option("--cat", cat, "the content of the file PATH of the image");
	app.add_option("--name", name, "name of the result of --truth")->needs(compared);
	CLI11_PARSE(app, argc, argv);
	if (!truth.empty()) {
		const auto body = [&]() -> std::optional<std::string> {
			compare(erofs::Image(file, devices), truth);
			return {};
		};
		return ktap::run("oracle", {{name.empty() ? file.filename().string() : name, body}})
			       ? 0
			       : 1;
	}
	try {
		const erofs::Image image(file, devices);
		if (listing)
			list(image);
		else if (!cat.empty())
			write_content(image, cat);
		else
			show_extents(image, extents);
		return 0;
	} catch (const std::exception &error) {
		std::cerr << "erofs_oracle: " << error.what() << "\n";
		return 1;
	}
}
