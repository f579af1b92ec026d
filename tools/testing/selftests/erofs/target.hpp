// SPDX-License-Identifier: GPL-2.0-only
// A file of the mounted image and what it has to contain.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include <linux/fiemap.h>
#include <linux/stat.h>
#include <sys/ioctl.h>

#include "io.hpp"

struct Target {
	std::string name;
	std::filesystem::path path;
	Fd fd;
	std::vector<std::byte> truth;
	size_t block;
	bool compressed;
	bool packed;		    // as a whole, together with other files
	std::vector<size_t> starts; // of extents, as far as the kernel tells
	struct {
		size_t offset, memory;
	} direct; // alignment that direct reads need; 0 if they are never direct

	size_t size() const { return truth.size(); }
	std::span<const std::byte> expect(size_t offset, size_t length) const
	{
		const auto start = std::min(offset, size());
		return std::span(truth).subspan(start, std::min(length, size() - start));
	}
	// How much a direct read has to decode: an extent from its start on.
	size_t decoded(size_t offset, size_t length) const
	{
		const auto next = std::ranges::upper_bound(starts, offset);
		const auto start = next == starts.begin() ? offset : *(next - 1);
		return std::min(offset + length, size()) - std::min(start, size());
	}
	size_t aligned_size() const { return (size() + block - 1) / block * block; }
	// What is in the page cache is copied from there: it is to be decoded, too.
	void uncache() const { ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); }
};

// A call that returned less than 0 has left the reason in errno.
inline void expect(const std::filesystem::path &file, size_t offset, std::string_view what,
		   ssize_t want, ssize_t got)
{
	if (want != got)
		throw Error(file.string(), static_cast<off_t>(offset),
			    std::to_string(want) + ' ' + std::string(what),
			    got < 0 ? errno_text(errno) : std::to_string(got));
}

inline void expect_bytes(const std::filesystem::path &file, size_t offset,
			 std::span<const std::byte> want, std::span<const std::byte> got)
{
	if (got.size() < want.size())
		throw Error(file.string(), static_cast<off_t>(offset),
			    std::to_string(want.size()) + " bytes", std::to_string(got.size()));
	const auto [expected, wrong] = std::ranges::mismatch(want, got);
	if (expected != want.end())
		throw Error(file.string(), static_cast<off_t>(offset) + (expected - want.begin()),
			    "byte " + std::to_string(std::to_integer<int>(*expected)),
			    std::to_string(std::to_integer<int>(*wrong)));
}

// In order, one request at a time; errors are those of `name`.
inline void read_singly(const Target &target, const std::filesystem::path &name, int fd,
			size_t step, size_t end)
{
	const Mapping memory(step);
	for (size_t at = 0; at < end; at += step) {
		const auto want = target.expect(at, step);
		expect(name, at, "bytes", static_cast<ssize_t>(want.size()),
		       ::pread(fd, memory.bytes().data(), step, static_cast<off_t>(at)));
		expect_bytes(name, at, want, memory.bytes());
	}
}

// By their paths below `top`, in order.
inline std::vector<std::filesystem::path> regular_files(const std::filesystem::path &top)
{
	std::vector<std::filesystem::path> paths;
	for (const auto &item : std::filesystem::recursive_directory_iterator(top))
		if (item.is_regular_file() && !item.is_symlink())
			paths.push_back(item.path().lexically_relative(top));
	if (paths.empty())
		throw Error(top.string(), 0, "files", "none");
	std::ranges::sort(paths);
	return paths;
}

inline std::vector<std::byte> slurp(const std::filesystem::path &path, const Fd &fd, size_t offset,
				    size_t length)
{
	std::vector<std::byte> data(length);
	for (size_t done = 0; done < length;) {
		const auto got = ::pread(fd, data.data() + done, length - done,
					 static_cast<off_t>(offset + done));
		if (got <= 0)
			throw Error(path.string(), static_cast<off_t>(offset + done), "data",
				    got ? errno_text(errno) : "end of file");
		done += static_cast<size_t>(got);
	}
	return data;
}

inline std::vector<std::byte> slurp(const std::filesystem::path &path)
{
	const Fd fd(path, O_RDONLY);
	return slurp(path, fd, 0, file_size(fd));
}

// Where the extents of a file begin in it, and whether any has a place of its own on a device.
struct Extents {
	std::vector<size_t> starts;
	bool placed = false;
};

inline Extents extents(int fd)
{
	constexpr size_t kBatch = 256;
	alignas(fiemap) std::array<std::byte, sizeof(fiemap) + kBatch * sizeof(fiemap_extent)>
		space{};
	auto *const map = reinterpret_cast<fiemap *>(space.data());
	Extents all;
	size_t start = 0;
	do {
		map->fm_start = start;
		map->fm_length = FIEMAP_MAX_OFFSET - start;
		map->fm_extent_count = kBatch;
		// FS_IOC_FIEMAP, but <linux/fs.h> does not go with <sys/mount.h> of glibc 2.36
		if (::ioctl(fd, _IOWR('f', 11, fiemap), map)) {
			// of damaged files, or unknown algorithms, the kernel does not tell
			if (errno == EUCLEAN || errno == EOPNOTSUPP)
				break;
			throw Error("FIEMAP", static_cast<off_t>(start), "success",
				    errno_text(errno));
		}
		for (const auto &extent : std::span(map->fm_extents, map->fm_mapped_extents)) {
			all.starts.push_back(extent.fe_logical);
			all.placed |= extent.fe_physical != 0;
			start = extent.fe_logical + extent.fe_length;
		}
	} while (map->fm_mapped_extents == kBatch);
	return all;
}

inline Target open_target(const std::filesystem::path &mount, const std::string &name,
			  std::vector<std::byte> truth)
{
	const auto path = mount / name;
	Fd fd(path, O_RDONLY | O_DIRECT);
	struct statx info;
	if (::statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_DIOALIGN, &info))
		throw Error(path.string(), 0, "statx", errno_text(errno));
	auto [starts, placed] = extents(fd);
	const bool packed = !starts.empty() && !placed;
	Target target{name,
		      path,
		      std::move(fd),
		      std::move(truth),
		      info.stx_blksize,
		      (info.stx_attributes & STATX_ATTR_COMPRESSED) != 0,
		      packed,
		      std::move(starts),
		      {info.stx_dio_offset_align, info.stx_dio_mem_align}};
	if (info.stx_size != target.size())
		throw Error(path.string(), 0, std::to_string(target.size()) + " bytes",
			    std::to_string(info.stx_size));
	return target;
}
