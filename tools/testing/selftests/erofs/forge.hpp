// SPDX-License-Identifier: GPL-2.0-only
// Writes EROFS images extent by extent, as the on-disk format allows and mkfs.erofs never does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace forge
{

inline constexpr size_t kKiB = 1024, kMiB = 1024 * kKiB;

// In the order of their numbers on disk.
enum class Algorithm : uint8_t { lz4, lzma, deflate, zstd };

enum class Fill : uint8_t {
	text,	  // words: shrinks to about a third
	mixed,	  // runs of text, noise and zeros
	noise,	  // does not shrink
	periodic, // shrinks to a few per cent, yet no two blocks are the same
	zeros,
};

// How the extents of a file are indexed.
enum class Layout : uint8_t { flat, full, compact, compact_2b, ext4, ext8, ext16, ext32 };

struct Extent {
	enum class Kind : uint8_t { compressed, smaller, plain, hole, shared, fragment };
	enum class Damage : uint8_t { none, unknown, torn, early, bloated, lost };

	Kind kind;
	size_t length; // decoded
	Fill fill = Fill::text;
	Algorithm algorithm = Algorithm::lz4;
	bool tail = false;
	unsigned device = 0;
	size_t gap = 0;
	size_t encoded = 0;
	std::string owner{};
	size_t from = 0; // shared: which extent of its owner; fragment: where in the packed inode

	Damage damage = Damage::none;
	bool at_block = false;

	// By an algorithm that nobody knows: nobody can look it up (records only).
	Extent unknown() && { return damage = Damage::unknown, std::move(*this); }
	// Only its first part can be decoded.
	Extent torn() && { return damage = Damage::torn, std::move(*this); }
	// What it decodes to ends inside its last page.
	Extent early() && { return damage = Damage::early, std::move(*this); }
	// Longer than what it decodes to: who looks up where it ends finds that out (indexes only).
	Extent bloated() && { return damage = Damage::bloated, std::move(*this); }
	// Said to be behind the end of any device, by a multiple of 2^32 blocks (records only).
	Extent lost() && { return damage = Damage::lost, std::move(*this); }
	// Kept behind the indexes of the inode.
	Extent inlined() && { return tail = true, std::move(*this); }
	Extent on(unsigned number) && { return device = number, std::move(*this); }
	// This many unused bytes in front of the pcluster: whole blocks in layouts of blocks.
	Extent after(size_t bytes) && { return gap = bytes, std::move(*this); }
	// At the next start of a block also in layouts where any byte would do.
	Extent in_block() && { return at_block = true, std::move(*this); }
	// As much noise among the data as makes the pcluster that long.
	Extent filling(size_t bytes) && { return encoded = bytes, std::move(*this); }
};

inline Extent compressed(Algorithm algorithm, size_t length, Fill fill = Fill::text)
{
	return {.kind = Extent::Kind::compressed,
		.length = length,
		.fill = fill,
		.algorithm = algorithm};
}
inline Extent lz4(size_t length, Fill fill = Fill::text)
{
	return compressed(Algorithm::lz4, length, fill);
}
inline Extent lzma(size_t length, Fill fill = Fill::text)
{
	return compressed(Algorithm::lzma, length, fill);
}
inline Extent deflate(size_t length, Fill fill = Fill::text)
{
	return compressed(Algorithm::deflate, length, fill);
}
inline Extent zstd(size_t length, Fill fill = Fill::text)
{
	return compressed(Algorithm::zstd, length, fill);
}
// Shifted, or interlaced in a file that is.
inline Extent plain(size_t length, Fill fill = Fill::noise)
{
	return {.kind = Extent::Kind::plain, .length = length, .fill = fill};
}
// Compressed if that makes it smaller, plain otherwise.
inline Extent smaller(Algorithm algorithm, size_t length, Fill fill = Fill::mixed)
{
	return {.kind = Extent::Kind::smaller,
		.length = length,
		.fill = fill,
		.algorithm = algorithm};
}
inline Extent hole(size_t length)
{
	return {.kind = Extent::Kind::hole, .length = length};
}
// The first bytes of what an extent of any file decodes to; only the first may be used.
inline Extent shared(std::string owner, size_t index, size_t length)
{
	return {.kind = Extent::Kind::shared,
		.length = length,
		.owner = std::move(owner),
		.from = index};
}
inline Extent fragment(size_t offset, size_t length)
{
	return {.kind = Extent::Kind::fragment, .length = length, .from = offset};
}

struct File {
	std::string name;
	Layout layout;
	std::vector<Extent> extents;
	bool interlaced = false;
	unsigned lcluster_bits = 0; // more than those of a block
	bool extended = false;	    // a 64-byte inode
	bool in_metabox = false;
	bool open_end = false; // no index tells where in the last lcluster the last extent ends
};

struct Metabox {
	Layout layout;
	Algorithm algorithm;
	size_t extent; // bytes of metadata in each
};

struct Image {
	std::string name;
	std::pair<unsigned, unsigned> since; // the first kernel that reads it
	std::vector<File> files;
	unsigned block_bits = 12;
	std::optional<File> packed{};
	std::optional<Metabox> metabox{};
	// First blocks of the devices behind the primary one; 0: where the one before ends.
	std::vector<uint64_t> devices{};
	std::string unknown_to_fsck{}; // what in it fsck.erofs 1.9 cannot read
	bool damaged = false;	       // reads fail

	size_t block() const { return size_t{1} << block_bits; }
};

// image.erofs, device1.img and so on, and the truth: files/
void write(const Image &image, const std::filesystem::path &directory);

} // namespace forge
