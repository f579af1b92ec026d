// SPDX-License-Identifier: GPL-2.0-only
// What an EROFS image contains, decoded without the kernel: the oracle of the tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

namespace erofs
{

// The first four have the numbers that they have on disk.
enum class Algorithm : uint8_t {
	lz4,
	lzma,
	deflate,
	zstd,
	// stored as it is
	shifted,
	// stored so that each byte has the same offset in its block as in the file
	interlaced,
};

std::string_view name(Algorithm algorithm);

// Neither mapped nor fragment: a hole. What is not compressed is mapped and shifted, plen == llen.
struct Extent {
	uint64_t la = 0, llen = 0;
	// On `device`; of a fragment: in the packed inode; of meta data of an inode in the metabox:
	// in the metabox.
	uint64_t pa = 0, plen = 0;
	Algorithm algorithm = Algorithm::shifted;
	bool mapped = false;
	// inline data: behind the inode
	bool meta = false;
	bool fragment = false;
	// llen is only a part of what the pcluster decodes to
	bool partial = false;
	// 0: the image, n: the n-th extra device
	uint16_t device = 0;
};

struct Entry {
	// relative to the root
	std::filesystem::path path;
	uint64_t nid = 0, size = 0;
	bool compressed = false;
};

// Throws Error for whatever a corrupt image may hold. Not for concurrent use: reads are cached.
class Image
{
public:
	// Without extra devices those of the device table are parts of the image.
	explicit Image(const std::filesystem::path &path,
		       const std::vector<std::filesystem::path> &devices = {});
	Image(Image &&) noexcept;
	~Image();

	// All regular files, sorted by path.
	std::vector<Entry> files() const;
	// In file order, contiguous, up to the size of the file.
	std::vector<Extent> extents(const Entry &) const;
	// Whole content, of up to 1 GiB.
	std::vector<std::byte> read(const Entry &) const;
	// A part of it; what is behind the end of the file is an Error.
	std::vector<std::byte> read(const Entry &, uint64_t offset, size_t length) const;

private:
	class Volume;
	std::unique_ptr<Volume> volume_;
};

} // namespace erofs
