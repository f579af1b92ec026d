// SPDX-License-Identifier: GPL-2.0-only
// Written from the on-disk format, and on purpose not in the way of the kernel: all indexes of a
// file are read once, forwards, into one list of extents, and everything else works on that list.
#include "image.hpp"

#include <algorithm>
#include <array>
#include <climits>
#include <concepts>
#include <cstdio>
#include <optional>
#include <set>
#include <span>

#include <lz4.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>

#include "io.hpp"

namespace fs = std::filesystem;

namespace erofs
{

namespace
{

using Bytes = std::vector<std::byte>;
using View = std::span<const std::byte>;

constexpr uint64_t super_offset = 1024, slot_size = 32, device_slot_size = 128;
constexpr uint64_t max_pcluster = 1 << 20, max_decoded = 12 << 20;
// What a corrupt image may make us allocate.
constexpr uint64_t max_indexes = 1 << 22, max_entries = 1 << 22, max_read = 1 << 30;
constexpr uint64_t mask48 = (uint64_t{1} << 48) - 1, top_bit = uint64_t{1} << 63;

constexpr uint32_t compat_checksum = 1;
constexpr uint32_t lz4_0padding = 0x1, compr_cfgs = 0x2, big_pcluster = 0x2, device_table = 0x8,
		   fragments_feature = 0x20, layout_48bit = 0x80, metabox_feature = 0x100,
		   all_features = 0x1ff;

constexpr uint16_t advise_2b = 0x1, advise_extents = 0x1, advise_big1 = 0x2, advise_big2 = 0x4,
		   advise_inline = 0x8, advise_interlaced = 0x10, advise_fragment = 0x20;

enum Layout : unsigned {
	flat_plain,
	compressed_full,
	flat_inline,
	compressed_compact,
	chunk_based
};
enum Type : unsigned { plain, head1, nonhead, head2 };

template <std::unsigned_integral T> T le(View bytes, uint64_t at)
{
	if (at > bytes.size() || sizeof(T) > bytes.size() - at)
		throw std::logic_error("a field behind the end of what was read");
	T value = 0;
	for (size_t i = 0; i < sizeof(T); ++i)
		value = static_cast<T>(value | static_cast<T>(bytes[at + i]) << 8 * i);
	return value;
}

constexpr uint64_t align(uint64_t value, uint64_t to)
{
	return (value + to - 1) / to * to;
}

std::string hex(uint64_t value)
{
	std::array<char, 24> text;
	std::snprintf(text.data(), text.size(), "%#llx", static_cast<unsigned long long>(value));
	return text.data();
}

// Bytes that can be read at any place: a device, or what a file of the image decodes to.
class Space
{
public:
	Space(std::string name, uint64_t size) : name_(std::move(name)), size_(size) {}
	Space(Space &&) = default;
	virtual ~Space() = default;

	const std::string &name() const { return name_; }
	uint64_t size() const { return size_; }

	[[noreturn]] void bad(uint64_t at, std::string_view expected, std::string_view got) const
	{
		throw Error(name_, static_cast<off_t>(at), expected, got);
	}

	Bytes bytes(uint64_t at, uint64_t length) const
	{
		check(at, length);
		Bytes out(length);
		fill(at, out);
		return out;
	}

	void read(uint64_t at, std::span<std::byte> out) const
	{
		check(at, out.size());
		fill(at, out);
	}

private:
	void check(uint64_t at, uint64_t length) const
	{
		if (at > size_ || length > size_ - at)
			bad(at, std::to_string(length) + " bytes",
			    "the end at " + std::to_string(size_));
	}

	virtual void fill(uint64_t at, std::span<std::byte> out) const = 0;

	std::string name_;
	uint64_t size_;
};

class Device : public Space
{
public:
	explicit Device(const fs::path &path) : Device(Fd(path, O_RDONLY), path.string()) {}

private:
	Device(Fd fd, const std::string &path) : Space(path, end_of(fd, path)), fd_(std::move(fd))
	{
	}

	// of a block device, too
	static uint64_t end_of(int fd, const std::string &path)
	{
		const auto end = ::lseek(fd, 0, SEEK_END);
		if (end < 0)
			throw Error(path, 0, "a file or block device", errno_text(errno));
		return static_cast<uint64_t>(end);
	}

	void fill(uint64_t at, std::span<std::byte> out) const override
	{
		while (!out.empty()) {
			const auto got =
				::pread(fd_, out.data(), out.size(), static_cast<off_t>(at));
			if (got <= 0)
				bad(at, std::to_string(out.size()) + " bytes",
				    got ? errno_text(errno) : "end of file");
			out = out.subspan(static_cast<size_t>(got));
			at += static_cast<uint64_t>(got);
		}
	}

	Fd fd_;
};

// `available` has a bit for each algorithm; the limits are those that the decoders get.
struct Configuration {
	unsigned available = 0;
	uint32_t lzma_dictionary = 0;
	int zstd_window = 0;
};

uint32_t crc32c(View bytes, uint32_t crc)
{
	for (const auto byte : bytes) {
		crc ^= static_cast<uint8_t>(byte);
		for (int bit = 0; bit < 8; ++bit)
			crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
	}
	return crc;
}

// The superblock and what it says about all files.
class Disk
{
public:
	Disk(const fs::path &path, const std::vector<fs::path> &extra)
	{
		devices_.emplace_back(path);
		for (const auto &device : extra)
			devices_.emplace_back(device);
		const auto super = superblock();
		if (le<uint32_t>(super, 8) & compat_checksum)
			checksum(le<uint32_t>(super, 4));
		configure(super);
		scan_devices(super);
	}

	const Device &image() const { return devices_.front(); }
	const Device &device(unsigned id) const { return devices_.at(id); }
	uint64_t block() const { return uint64_t{1} << block_bits; }
	bool has(uint32_t feature) const { return features & feature; }
	unsigned device_mask() const { return device_mask_; }

	void locate(Extent &extent, uint64_t at, const Space &meta) const
	{
		if (extent.device && flat_) {
			if (extent.device > slots_.size())
				meta.bad(at, "a device up to " + std::to_string(slots_.size()),
					 std::to_string(extent.device));
			extent.pa += slots_[extent.device - 1].first << block_bits;
			extent.device = 0;
		} else if (extent.device >= devices_.size()) {
			meta.bad(at, "a device up to " + std::to_string(devices_.size() - 1),
				 std::to_string(extent.device));
		} else if (!extent.device && !flat_) {
			for (size_t i = 0; i < slots_.size(); ++i) {
				const auto [first, count] = slots_[i];
				const auto block = extent.pa >> block_bits;
				if (!first || block < first || block - first >= count)
					continue;
				extent.pa -= first << block_bits;
				extent.device = static_cast<uint16_t>(i + 1);
				break;
			}
		}
	}

	unsigned block_bits = 0;
	uint32_t features = 0;
	uint64_t meta_start = 0, root = 0, packed = 0, metabox = 0;
	Configuration config;

private:
	// where a device appears among the blocks of the image, if it does
	struct Slot {
		uint64_t first, count;
	};

	Bytes superblock()
	{
		const auto &disk = image();
		auto super = disk.bytes(super_offset, 128);
		if (const auto magic = le<uint32_t>(super, 0); magic != 0xe0f5e1e2)
			disk.bad(super_offset, "the magic number 0xe0f5e1e2", hex(magic));
		features = le<uint32_t>(super, 80);
		if (features & ~all_features)
			disk.bad(super_offset + 80,
				 "no incompatible features but " + hex(all_features),
				 hex(features));
		block_bits = le<uint8_t>(super, 12);
		if (block_bits < 9 || block_bits > 16)
			disk.bad(super_offset + 12, "9 to 16 bits of a block",
				 std::to_string(block_bits));
		if (const auto bits = le<uint8_t>(super, 90))
			disk.bad(super_offset + 90, "no bits of a directory block",
				 std::to_string(bits));
		super_size_ = 128 + 16 * le<uint8_t>(super, 13);
		super = disk.bytes(super_offset, super_size_);
		meta_start = uint64_t{le<uint32_t>(super, 40)} << block_bits;
		root = le<uint16_t>(super, 14);
		if (const auto wide = le<uint64_t>(super, 112); has(layout_48bit) && wide)
			root = wide;
		if (has(fragments_feature))
			packed = le<uint64_t>(super, 96);
		if (has(metabox_feature)) {
			if (super_size_ < 144)
				disk.bad(super_offset + 13, "a superblock with a metabox",
					 std::to_string(super_size_) + " bytes");
			metabox = le<uint64_t>(super, 128);
		}
		return super;
	}

	void checksum(uint32_t expected) const
	{
		const auto end = block() > super_offset ? block() : super_offset + block();
		const auto covered = image().bytes(super_offset + 8, end - super_offset - 8);
		if (const auto got = crc32c(covered, 0x5045b54a); got != expected)
			image().bad(super_offset + 4, "the checksum " + hex(expected), hex(got));
	}

	void configure(View super)
	{
		const auto word = le<uint16_t>(super, 84);
		if (!has(compr_cfgs)) {
			config.available = word || has(lz4_0padding);
			return;
		}
		if (word > 15)
			image().bad(super_offset + 84, "algorithms up to 0xf", hex(word));
		config.available = word;
		auto at = super_offset + super_size_;
		for (unsigned i = 0; i < 4; ++i) {
			if (!(word >> i & 1))
				continue;
			at = align(at, 4);
			const auto length = le<uint16_t>(image().bytes(at, 2), 0);
			const auto record = image().bytes(at + 2, length ? length : 65536);
			configure(static_cast<Algorithm>(i), at, record);
			at += 2 + record.size();
		}
	}

	void configure(Algorithm algorithm, uint64_t at, View record)
	{
		const auto is_long = algorithm == Algorithm::lz4 || algorithm == Algorithm::lzma;
		if (const size_t least = is_long ? 14 : 6; record.size() < least)
			image().bad(at, "a configuration of " + std::to_string(least) + " bytes",
				    std::to_string(record.size()));
		if (algorithm == Algorithm::lz4) {
			const auto blocks = le<uint16_t>(record, 2);
			if (blocks > max_pcluster >> block_bits)
				image().bad(at + 4, "pclusters of up to 1 MiB",
					    std::to_string(blocks) + " blocks");
		} else if (algorithm == Algorithm::lzma) {
			config.lzma_dictionary = le<uint32_t>(record, 0);
			if (config.lzma_dictionary < 4096 || config.lzma_dictionary > 8 << 20)
				image().bad(at + 2, "an LZMA dictionary of 4 KiB to 8 MiB",
					    std::to_string(config.lzma_dictionary));
			if (const auto format = le<uint16_t>(record, 4))
				image().bad(at + 6, "LZMA format 0", std::to_string(format));
		} else if (algorithm == Algorithm::zstd) {
			if (const auto format = le<uint8_t>(record, 0))
				image().bad(at + 2, "zstd format 0", std::to_string(format));
			config.zstd_window = 10 + le<uint8_t>(record, 1);
			if (config.zstd_window > 20)
				image().bad(at + 3, "a zstd window of up to 20 bits",
					    std::to_string(config.zstd_window));
		}
	}

	void scan_devices(View super)
	{
		const unsigned count = has(device_table) ? le<uint16_t>(super, 86) : 0;
		if (devices_.size() > 1 && devices_.size() - 1 != count)
			image().bad(super_offset + 86,
				    std::to_string(devices_.size() - 1) + " extra devices",
				    std::to_string(count));
		flat_ = devices_.size() == 1;
		while (device_mask_ < count)
			device_mask_ = device_mask_ << 1 | 1;
		const auto at = le<uint16_t>(super, 88) * device_slot_size;
		const auto table = image().bytes(count ? at : 0, count * device_slot_size);
		const auto number = [&](uint64_t low, uint64_t high) {
			const uint64_t upper = has(layout_48bit) ? le<uint16_t>(table, high) : 0;
			return upper << 32 | le<uint32_t>(table, low);
		};
		for (uint64_t slot = 0; slot < table.size(); slot += device_slot_size)
			slots_.push_back(
				{number(slot + 68, slot + 74), number(slot + 64, slot + 72)});
	}

	std::vector<Device> devices_;
	std::vector<Slot> slots_;
	uint64_t super_size_ = 0;
	unsigned device_mask_ = 0;
	// all extra devices are parts of the image
	bool flat_ = true;
};

struct Inode {
	// `start`: of the inode; `body`: of what follows it and its xattrs
	uint64_t nid = 0, size = 0, start = 0, body = 0;
	uint16_t mode = 0;
	Layout layout = flat_plain;
	uint32_t union_word = 0;
	uint64_t first_block = 0;
	bool no_blocks = false;

	bool compressed() const
	{
		return layout == compressed_full || layout == compressed_compact;
	}
};

Inode load(const Disk &disk, const Space &meta, uint64_t nid)
{
	Inode inode{.nid = nid};
	if ((nid & ~top_bit) >> 57)
		meta.bad(0, "an inode number up to 57 bits", hex(nid));
	inode.start = (nid & ~top_bit) * slot_size + (nid & top_bit ? 0 : disk.meta_start);
	auto raw = meta.bytes(inode.start, 32);
	const auto format = le<uint16_t>(raw, 0);
	const bool extended = format & 1, one_link = format & 16;
	if (format > 31 || (format >> 1 & 7) > chunk_based)
		meta.bad(inode.start, "a known inode format", hex(format));
	if (extended)
		raw = meta.bytes(inode.start, 64);
	inode.layout = static_cast<Layout>(format >> 1 & 7);
	inode.mode = le<uint16_t>(raw, 4);
	switch (inode.mode & S_IFMT) {
	case S_IFREG:
	case S_IFDIR:
	case S_IFLNK:
	case S_IFCHR:
	case S_IFBLK:
	case S_IFIFO:
	case S_IFSOCK:
		break;
	default:
		meta.bad(inode.start + 4, "a known type of file", hex(inode.mode));
	}
	const auto xattrs = le<uint16_t>(raw, 2);
	inode.body = inode.start + raw.size() + (xattrs ? 12 + 4 * (xattrs - 1) : 0);
	inode.size = extended ? le<uint64_t>(raw, 8) : le<uint32_t>(raw, 8);
	if (inode.size & top_bit)
		meta.bad(inode.start + 8, "a size up to 63 bits", hex(inode.size));
	inode.union_word = le<uint32_t>(raw, 16);
	// a compact inode that has to tell its number of links has no upper half
	const bool wide = extended || (one_link && !S_ISDIR(inode.mode));
	inode.first_block = inode.union_word | (wide ? uint64_t{le<uint16_t>(raw, 6)} << 32 : 0);
	inode.no_blocks = inode.first_block == (wide ? mask48 : mask48 >> 16);
	if (inode.compressed() && !disk.config.available)
		meta.bad(inode.start, "no compressed inode where no algorithm is available",
			 hex(format));
	return inode;
}

// From the inode to the list of its extents.
class Mapper
{
public:
	Mapper(const Disk &disk, const Space &meta, const Inode &inode)
	    : disk_(disk), meta_(meta), inode_(inode)
	{
	}

	std::vector<Extent> map()
	{
		if (!inode_.size)
			return {};
		if (inode_.layout == chunk_based)
			chunks();
		else if (inode_.compressed())
			compressed();
		else
			flat();
		finish();
		return std::move(extents_);
	}

private:
	struct Lcluster {
		Type type = plain;
		bool partial = false, hole = false;
		// where its extent starts
		uint16_t offset = 0;
		uint64_t block = 0;
		// nonhead: blocks of the pcluster, or lclusters to (or towards) the head
		std::optional<unsigned> count{}, back{};
	};

	uint64_t indexes(uint64_t count) const
	{
		if (count > max_indexes)
			meta_.bad(inode_.start, "up to " + std::to_string(max_indexes) + " indexes",
				  std::to_string(count));
		return count;
	}

	void within_block(uint64_t at, uint64_t length) const
	{
		if (const auto end = at % disk_.block() + length; end > disk_.block())
			meta_.bad(at, "inline data up to the end of a block",
				  std::to_string(end - disk_.block()) + " bytes more");
	}

	void flat()
	{
		if (inode_.layout == flat_plain && inode_.no_blocks) {
			extents_.push_back({});
			return;
		}
		const bool tail = inode_.layout == flat_inline;
		const auto blocks = align(inode_.size, disk_.block()) / disk_.block() - tail;
		const auto start = blocks * disk_.block();
		if (blocks)
			extents_.push_back(
				{.pa = inode_.first_block << disk_.block_bits, .mapped = true});
		if (!tail)
			return;
		within_block(inode_.body, inode_.size - start);
		extents_.push_back({.la = start, .pa = inode_.body, .mapped = true, .meta = true});
	}

	void chunks()
	{
		const auto format = inode_.union_word & 0xffff;
		if (format > 0x7f)
			meta_.bad(inode_.start + 16, "a known chunk format", hex(format));
		const auto chunk = disk_.block() << (format & 31);
		const bool wide = format & 0x40;
		const uint64_t unit = format & 0x20 ? 8 : 4;
		const auto count = indexes((inode_.size + chunk - 1) / chunk);
		const auto table = meta_.bytes(align(inode_.body, unit), count * unit);
		for (uint64_t i = 0; i < count; ++i) {
			const auto entry = View(table).subspan(i * unit, unit);
			uint64_t block = le<uint32_t>(entry, unit - 4), none = mask48 >> 16;
			unsigned device = 0;
			if (unit == 8) {
				const auto high = uint64_t{le<uint16_t>(entry, 0)} << 32;
				none = wide ? mask48 : none;
				block = (block | high) & none;
				device = le<uint16_t>(entry, 2) & disk_.device_mask();
			}
			if (block == none)
				extents_.push_back({.la = i * chunk});
			else
				extents_.push_back({.la = i * chunk,
						    .pa = block << disk_.block_bits,
						    .mapped = true,
						    .device = static_cast<uint16_t>(device)});
		}
	}

	void compressed()
	{
		header_ = align(inode_.body, 8);
		const auto raw = meta_.bytes(header_, 8);
		const auto whole = le<uint64_t>(raw, 0);
		if (whole & top_bit) {
			extents_.push_back({.pa = whole & ~top_bit, .fragment = true});
			return;
		}
		advise_ = le<uint16_t>(raw, 4);
		lcluster_bits_ = disk_.block_bits + (le<uint8_t>(raw, 7) & 15);
		if (inode_.layout == compressed_full && advise_ & advise_extents) {
			const uint64_t size = 4 << (advise_ >> 1 & 3);
			const auto count =
				uint64_t{le<uint16_t>(raw, 6)} << 32 | le<uint32_t>(raw, 0);
			return size < 16 ? fixed_records(size) : free_records(size, count);
		}
		const auto algorithms = le<uint8_t>(raw, 6);
		for (unsigned i = 0; i < 2; ++i) {
			const unsigned number = algorithms >> 4 * i & 15;
			if (number > 3)
				meta_.bad(header_ + 6, "algorithms up to 3", hex(algorithms));
			algorithms_[i] = static_cast<Algorithm>(number);
		}
		lclusters();
		tail(raw);
	}

	bool counts(Type type) const
	{
		return advise_ & (type == head1 ? advise_big1 : advise_big2);
	}

	Algorithm algorithm(Type type) const
	{
		if (type != plain)
			return algorithms_[type == head2];
		return advise_ & advise_interlaced ? Algorithm::interlaced : Algorithm::shifted;
	}

	void lclusters()
	{
		const bool big1 = counts(head1), big2 = counts(head2);
		const bool compact = inode_.layout == compressed_compact;
		if ((big1 || big2) && !disk_.has(big_pcluster))
			meta_.bad(header_ + 4, "no big pclusters without the feature",
				  hex(advise_));
		if (compact && big1 != big2)
			meta_.bad(header_ + 4, "compact indexes with big pclusters for both heads",
				  hex(advise_));
		const auto unit = uint64_t{1} << lcluster_bits_;
		const auto count = indexes((inode_.size + unit - 1) / unit);
		const auto index = compact ? compact_index(count) : full_index(count);
		uint64_t head = 0;
		for (uint64_t i = 0; i < count; ++i) {
			const auto &one = index[i];
			if (one.type == nonhead) {
				if (extents_.empty())
					bad_lcluster(i, "a head", "none");
				follow(i, i - head, index[head], one);
				continue;
			}
			if (one.offset >= unit)
				bad_lcluster(i, "an offset below " + std::to_string(unit),
					     std::to_string(one.offset));
			const auto la = i * unit + one.offset;
			// the end of the last extent, told by a head of nothing
			if (la >= inode_.size)
				break;
			head = i;
			tail_block_ = one.block;
			extents_.push_back({.la = la,
					    .pa = one.block << disk_.block_bits,
					    .plen = one.hole ? 0 : disk_.block(),
					    .algorithm = algorithm(one.type),
					    .mapped = !one.hole,
					    .partial = one.partial});
		}
	}

	[[noreturn]] void bad_lcluster(uint64_t number, std::string_view expected,
				       std::string_view got) const
	{
		meta_.bad(header_,
			  "at lcluster " + std::to_string(number) + " of inode " + hex(inode_.nid) +
				  " " + std::string(expected),
			  got);
	}

	// What a nonhead adds to its extent.
	void follow(uint64_t number, uint64_t distance, const Lcluster &head, const Lcluster &one)
	{
		auto &extent = extents_.back();
		if (one.count) {
			if (distance != 1 || !counts(head.type))
				bad_lcluster(number, "no number of blocks",
					     std::to_string(*one.count));
			extent.plen = head.hole ? 0 : *one.count * disk_.block();
			extent.mapped = extent.plen;
		} else if (distance == 1 && counts(head.type) && !head.hole) {
			bad_lcluster(number, "a number of blocks", "none");
		} else if (one.back && (!*one.back || *one.back > distance)) {
			bad_lcluster(number, "a head up to " + std::to_string(distance) + " before",
				     std::to_string(*one.back));
		}
	}

	Lcluster make_nonhead(unsigned value, bool is_back) const
	{
		Lcluster one{.type = nonhead};
		if (value & 0x800)
			one.count = value & ~0x800U;
		else if (is_back)
			one.back = value;
		return one;
	}

	std::vector<Lcluster> full_index(uint64_t count)
	{
		const auto start = header_ + 16;
		const auto table = meta_.bytes(start, count * 8);
		index_end_ = start + table.size();
		std::vector<Lcluster> index;
		for (uint64_t at = 0; at < table.size(); at += 8) {
			const auto bits = le<uint16_t>(table, at);
			const auto type = static_cast<Type>(bits & 3);
			if (type == nonhead)
				index.push_back(make_nonhead(le<uint16_t>(table, at + 4), true));
			else
				index.push_back({.type = type,
						 .partial = (bits & 0x8000) != 0,
						 .hole = (bits & 0x4000) != 0,
						 .offset = le<uint16_t>(table, at + 2),
						 .block = le<uint32_t>(table, at + 4)});
		}
		return index;
	}

	// Packs of two lclusters up to a multiple of 32 bytes, then of 16, then of two again.
	std::vector<Lcluster> compact_index(uint64_t count)
	{
		if (lcluster_bits_ > 14)
			meta_.bad(header_ + 7, "compact indexes of lclusters up to 16 KiB",
				  std::to_string(lcluster_bits_) + " bits");
		const auto start = header_ + 8;
		// of blocks, even if the lclusters were larger
		const auto total = (inode_.size + disk_.block() - 1) / disk_.block();
		const uint64_t first = (32 - start % 32) / 4 % 8;
		const auto dense =
			advise_ & advise_2b && first < total ? (total - first) / 16 * 16 : 0;
		std::vector<Lcluster> index;
		index_end_ = start;
		while (index.size() < count) {
			const bool in_dense = index.size() >= first && index.size() - first < dense;
			if (in_dense && lcluster_bits_ > 12)
				meta_.bad(header_ + 7, "dense indexes of lclusters up to 4 KiB",
					  std::to_string(lcluster_bits_) + " bits");
			unpack(meta_.bytes(index_end_, in_dense ? 32 : 8), in_dense ? 16 : 2,
			       index);
			index_end_ += in_dense ? 32 : 8;
		}
		index.resize(count);
		return index;
	}

	void unpack(View pack, unsigned count, std::vector<Lcluster> &index) const
	{
		const auto value_bits = std::max(lcluster_bits_, 12U);
		const auto item_bits = (pack.size() - 4) * 8 / count;
		const bool big = counts(head1);
		// without big pclusters the pack has the block before that of its first head
		auto block = le<uint32_t>(pack, pack.size() - 4) + !big;
		const auto begin = index.size();
		for (unsigned i = 0; i < count; ++i) {
			const auto item =
				le<uint32_t>(pack, i * item_bits / 8) >> i * item_bits % 8;
			const auto value = item & ((1U << value_bits) - 1);
			const auto type = static_cast<Type>(item >> value_bits & 3);
			// the last one of a pack looks forwards
			if (type == nonhead)
				index.push_back(make_nonhead(value, i + 1 < count));
			else
				index.push_back(
					{.type = type, .offset = static_cast<uint16_t>(value)});
		}
		for (auto i = begin; i < index.size(); ++i) {
			auto &one = index[i];
			const bool counted = i + 1 < index.size() && index[i + 1].count;
			one.block = block;
			block += one.type == nonhead ? (big ? one.count.value_or(0) : 0)
						     : !(big && counted);
		}
	}

	// The extent with the last byte may be elsewhere.
	void tail(View header)
	{
		if (extents_.empty())
			return;
		auto &last = extents_.back();
		const auto length = le<uint16_t>(header, 2);
		if (advise_ & advise_fragment) {
			const bool wide = inode_.layout == compressed_full;
			last = {.la = last.la,
				.pa = le<uint32_t>(header, 0) | (wide ? tail_block_ << 32 : 0),
				.fragment = true};
		} else if (advise_ & advise_inline && length) {
			within_block(index_end_, length);
			last.pa = index_end_;
			last.plen = length;
			last.mapped = last.meta = true;
			if (last.algorithm == Algorithm::interlaced)
				last.algorithm = Algorithm::shifted;
		}
	}

	// One record for each lcluster.
	void fixed_records(uint64_t size)
	{
		const auto unit = uint64_t{1} << lcluster_bits_;
		const auto count = indexes((inode_.size + unit - 1) / unit);
		auto at = align(header_ + 8, size);
		uint64_t pa = 0;
		if (size == 4) {
			pa = le<uint64_t>(meta_.bytes(at, 8), 0);
			at += 8;
		}
		const auto table = meta_.bytes(at, count * size);
		for (uint64_t i = 0; i < count; ++i) {
			const auto word = le<uint32_t>(table, i * size);
			if (size == 8)
				pa = le<uint32_t>(table, i * size + 4);
			const auto offset = size == 8 ? pa << 32 | word : word;
			record(i * unit, word, pa, i + 1 == count, offset);
			pa += extents_.back().plen;
		}
	}

	void free_records(uint64_t size, uint64_t count)
	{
		const auto table = meta_.bytes(align(header_ + 8, size), indexes(count) * size);
		for (uint64_t at = 0; at < table.size(); at += size) {
			const auto low = le<uint32_t>(table, at + 4);
			const auto pa = uint64_t{le<uint32_t>(table, at + 8)} << 32 | low;
			auto la = uint64_t{le<uint32_t>(table, at + 12)};
			if (size == 32)
				la |= uint64_t{le<uint32_t>(table, at + 16)} << 32;
			if (extents_.empty() && la)
				extents_.push_back({});
			const auto word = le<uint32_t>(table, at);
			record(la, word, pa, at + size == table.size(), pa << 32 | word);
		}
		if (extents_.empty())
			extents_.push_back({});
	}

	void record(uint64_t la, uint32_t word, uint64_t pa, bool last, uint64_t offset)
	{
		if (last && advise_ & advise_fragment) {
			extents_.push_back({.la = la, .pa = offset, .fragment = true});
			return;
		}
		Extent extent{.la = la, .pa = pa, .plen = word & ((max_pcluster << 1) - 1)};
		extent.mapped = extent.plen;
		extent.partial = word >> 27 & 1;
		const auto format = word >> 28;
		if (format > 4)
			meta_.bad(header_, "a format up to 4 of inode " + hex(inode_.nid),
				  std::to_string(format));
		if (format)
			extent.algorithm = static_cast<Algorithm>(format - 1);
		else if (advise_ & advise_interlaced && !((pa | extent.plen) % disk_.block()))
			extent.algorithm = Algorithm::interlaced;
		extents_.push_back(extent);
	}

	// An extent ends where the next one starts.
	void finish()
	{
		if (extents_.empty())
			meta_.bad(inode_.start,
				  "extents of " + std::to_string(inode_.size) + " bytes", "none");
		for (size_t i = 0; i < extents_.size(); ++i) {
			auto &extent = extents_[i];
			const bool last = i + 1 == extents_.size();
			const auto end = last ? inode_.size : extents_[i + 1].la;
			if (extent.la >= end || (!i && extent.la))
				meta_.bad(inode_.start,
					  "extents in order, from 0 to " +
						  std::to_string(inode_.size),
					  std::to_string(extent.la) + " before " +
						  std::to_string(end));
			extent.llen = end - extent.la;
			if (!extent.mapped)
				extent.algorithm = Algorithm::shifted;
			if (!inode_.compressed() || extent.fragment)
				extent.plen = extent.mapped || extent.fragment ? extent.llen : 0;
			else if (extent.mapped)
				check(extent, last);
			if (extent.mapped && !extent.meta)
				disk_.locate(extent, inode_.start, meta_);
		}
	}

	void check(const Extent &extent, bool last) const
	{
		const auto fail = [&](const std::string &expected, uint64_t got) {
			meta_.bad(inode_.start,
				  "at " + std::to_string(extent.la) + " of inode " +
					  hex(inode_.nid) + " " + expected,
				  std::to_string(got));
		};
		if (extent.plen > max_pcluster)
			fail("a pcluster of up to 1 MiB", extent.plen);
		if (extent.llen > max_decoded)
			fail("an extent of up to 12 MiB", extent.llen);
		if (extent.pa >> disk_.block_bits > mask48)
			fail("a block number of 48 bits", extent.pa);
		if (extent.algorithm >= Algorithm::shifted) {
			if (extent.llen > extent.plen)
				fail("not more than the " + std::to_string(extent.plen) +
					     " bytes that are stored",
				     extent.llen);
			return;
		}
		if (!(disk_.config.available >> static_cast<unsigned>(extent.algorithm) & 1))
			fail("an available algorithm", static_cast<unsigned>(extent.algorithm));
		if (!extent.partial && !last && extent.llen < extent.plen)
			fail("a pcluster not larger than its " + std::to_string(extent.llen) +
				     " bytes",
			     extent.plen);
	}

	const Disk &disk_;
	const Space &meta_;
	const Inode &inode_;
	std::vector<Extent> extents_;
	uint64_t header_ = 0, index_end_ = 0, tail_block_ = 0;
	uint16_t advise_ = 0;
	unsigned lcluster_bits_ = 0;
	std::array<Algorithm, 2> algorithms_{};
};

// Each decodes all of `out`, or less of it; true: nothing is wrong so far, and, unless `partial`,
// the stream ended there.
struct Job {
	View in;
	std::span<std::byte> out;
	bool partial;
	const Configuration &config;

	auto *source() const { return reinterpret_cast<const uint8_t *>(in.data()); }
	auto *target() const { return reinterpret_cast<uint8_t *>(out.data()); }
};

bool decode_lz4(const Job &job, bool padded)
{
	const auto *in = reinterpret_cast<const char *>(job.in.data());
	auto *out = reinterpret_cast<char *>(job.out.data());
	const auto have = static_cast<int>(job.in.size()), want = static_cast<int>(job.out.size());
	// nobody knows where the data of an old image ends
	if (job.partial || !padded)
		return LZ4_decompress_safe_partial(in, out, have, want, want) == want;
	return LZ4_decompress_safe(in, out, have, want) == want;
}

bool decode_lzma(const Job &job)
{
	lzma_stream stream = LZMA_STREAM_INIT;
	const std::unique_ptr<lzma_stream, decltype(&lzma_end)> owner(&stream, lzma_end);
	if (lzma_microlzma_decoder(&stream, job.in.size(), job.out.size(), !job.partial,
				   job.config.lzma_dictionary) != LZMA_OK)
		return false;
	stream.next_in = job.source();
	stream.avail_in = job.in.size();
	stream.next_out = job.target();
	stream.avail_out = job.out.size();
	return lzma_code(&stream, LZMA_FINISH) == LZMA_STREAM_END && !stream.avail_out;
}

bool decode_deflate(const Job &job)
{
	z_stream stream{};
	if (inflateInit2(&stream, -MAX_WBITS) != Z_OK)
		throw std::bad_alloc();
	const std::unique_ptr<z_stream, decltype(&inflateEnd)> owner(&stream, inflateEnd);
	stream.next_in = const_cast<Bytef *>(job.source());
	stream.avail_in = static_cast<uInt>(job.in.size());
	stream.next_out = job.target();
	stream.avail_out = static_cast<uInt>(job.out.size());
	const auto status = inflate(&stream, Z_SYNC_FLUSH);
	return !stream.avail_out && (status == Z_STREAM_END || (status == Z_OK && job.partial));
}

bool decode_zstd(const Job &job)
{
	const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(),
									   ZSTD_freeDCtx);
	if (!context)
		throw std::bad_alloc();
	ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, job.config.zstd_window);
	ZSTD_inBuffer in{job.in.data(), job.in.size(), 0};
	ZSTD_outBuffer out{job.out.data(), job.out.size(), 0};
	for (;;) {
		const auto before = in.pos + out.pos;
		const auto left = ZSTD_decompressStream(context.get(), &out, &in);
		if (ZSTD_isError(left))
			return false;
		if (!left || in.pos + out.pos == before)
			return out.pos == out.size && (!left || job.partial);
	}
}

bool decode(Algorithm algorithm, const Job &job, bool padded)
{
	switch (algorithm) {
	case Algorithm::lz4:
		return decode_lz4(job, padded);
	case Algorithm::lzma:
		return decode_lzma(job);
	case Algorithm::deflate:
		return decode_deflate(job);
	case Algorithm::zstd:
		return decode_zstd(job);
	default:
		throw std::logic_error("nothing to decode");
	}
}

// What a file of the image contains. Its own meta data and fragments are in spaces that were there
// before, so that no image can make them refer to each other.
class Content : public Space
{
public:
	Content(const Disk &disk, const Space &meta, const Space *fragments, const Inode &inode)
	    : Space(disk.image().name() + ": inode " + hex(inode.nid), inode.size), disk_(disk),
	      meta_(meta), fragments_(fragments), inode_(inode),
	      extents_(Mapper(disk, meta, inode).map())
	{
	}

	const Inode &inode() const { return inode_; }
	const std::vector<Extent> &extents() const { return extents_; }

private:
	void fill(uint64_t at, std::span<std::byte> out) const override
	{
		auto next = std::ranges::upper_bound(extents_, at, {}, &Extent::la);
		for (; !out.empty(); ++next) {
			const auto &extent = *std::prev(next);
			const auto skip = at - extent.la;
			const auto part =
				out.first(std::min<uint64_t>(out.size(), extent.llen - skip));
			fill(extent, skip, part);
			out = out.subspan(part.size());
			at += part.size();
		}
	}

	void fill(const Extent &extent, uint64_t skip, std::span<std::byte> out) const
	{
		if (extent.fragment) {
			if (!fragments_)
				bad(extent.la, "no fragment without a packed inode",
				    hex(extent.pa));
			if (extent.pa > fragments_->size())
				bad(extent.la,
				    "a fragment below " + std::to_string(fragments_->size()),
				    std::to_string(extent.pa));
			fragments_->read(extent.pa + skip, out);
		} else if (!extent.mapped) {
			std::ranges::fill(out, std::byte{});
		} else if (extent.algorithm == Algorithm::shifted) {
			where(extent).read(extent.pa + skip, out);
		} else {
			if (decoded_la_ != extent.la) {
				decoded_ = decoded(extent);
				decoded_la_ = extent.la;
			}
			std::ranges::copy(View(decoded_).subspan(skip, out.size()), out.begin());
		}
	}

	const Space &where(const Extent &extent) const
	{
		return extent.meta ? meta_ : disk_.device(extent.device);
	}

	Bytes decoded(const Extent &extent) const
	{
		const auto &space = where(extent);
		const auto stored = space.bytes(extent.pa, extent.plen);
		Bytes out(extent.llen);
		if (extent.algorithm == Algorithm::interlaced) {
			// What comes before the next block of the file is at the end. mkfs.erofs
			// makes single blocks only; of more, the kernel takes all but that from the
			// front.
			const auto right = disk_.block() - extent.la % disk_.block();
			for (uint64_t i = 0; i < out.size(); ++i)
				out[i] = stored[(i + stored.size() - right) % stored.size()];
			return out;
		}
		const bool padded = extent.algorithm != Algorithm::lz4 || disk_.has(lz4_0padding);
		const Job job{padded ? unpad(extent, stored) : stored, out, extent.partial,
			      disk_.config};
		if (!decode(extent.algorithm, job, padded))
			bad(extent.la,
			    std::string(erofs::name(extent.algorithm)) + " data at " +
				    std::to_string(extent.pa) + " of " + space.name() +
				    " that decodes to " +
				    std::string(extent.partial ? "at least " : "") +
				    std::to_string(extent.llen) + " bytes",
			    "something else");
		return out;
	}

	// The data is at the end of the pcluster, zeros in its first block before.
	View unpad(const Extent &extent, View stored) const
	{
		const auto block = disk_.block() - extent.pa % disk_.block();
		const auto first = stored.first(std::min<uint64_t>(stored.size(), block));
		const auto found =
			std::ranges::find_if(first, [](auto b) { return b != std::byte{}; });
		if (found == first.end())
			bad(extent.la,
			    "compressed data at " + std::to_string(extent.pa) + " of " +
				    where(extent).name(),
			    "zeros only");
		return stored.subspan(static_cast<size_t>(found - first.begin()));
	}

	const Disk &disk_;
	const Space &meta_;
	const Space *fragments_;
	Inode inode_;
	std::vector<Extent> extents_;
	// Neighbouring reads of one file mostly want the same extent.
	mutable Bytes decoded_;
	mutable uint64_t decoded_la_ = UINT64_MAX;
};

} // namespace

std::string_view name(Algorithm algorithm)
{
	static constexpr std::array<std::string_view, 6> names{"lz4",  "lzma",	  "deflate",
							       "zstd", "shifted", "interlaced"};
	return names.at(static_cast<size_t>(algorithm));
}

class Image::Volume
{
public:
	Volume(const fs::path &path, const std::vector<fs::path> &devices) : disk(path, devices)
	{
		// In this order: the metabox may have fragments, the packed inode is not in it.
		if (disk.packed)
			packed_.emplace(open(disk.packed));
		if (disk.has(metabox_feature)) {
			if (disk.metabox & top_bit)
				disk.image().bad(super_offset + 128,
						 "a metabox that is not in itself",
						 hex(disk.metabox));
			metabox_.emplace(open(disk.metabox));
		}
	}
	Volume(const Volume &) = delete;
	Volume &operator=(const Volume &) = delete;

	Inode inode(uint64_t nid) const { return load(disk, meta(nid), nid); }

	const Content &file(uint64_t nid)
	{
		if (!latest_ || latest_->inode().nid != nid) {
			latest_.reset();
			latest_.emplace(open(nid));
			if (!S_ISREG(latest_->inode().mode))
				latest_->bad(0, "a regular file", hex(latest_->inode().mode));
		}
		return *latest_;
	}

	std::vector<Entry> files() const
	{
		std::vector<Entry> found;
		std::vector<Entry> pending{{.path = {}, .nid = disk.root}};
		std::set<uint64_t> seen{disk.root};
		while (!pending.empty()) {
			const auto directory = std::move(pending.back());
			pending.pop_back();
			for (auto &entry : list(directory)) {
				const auto one = inode(entry.nid);
				entry.size = one.size;
				entry.compressed = one.compressed();
				if (S_ISREG(one.mode)) {
					found.push_back(std::move(entry));
				} else if (S_ISDIR(one.mode)) {
					if (!seen.insert(entry.nid).second)
						disk.image().bad(one.start, "each directory once",
								 entry.path.string());
					pending.push_back(std::move(entry));
				}
			}
			if (found.size() + pending.size() > max_entries)
				disk.image().bad(0,
						 "up to " + std::to_string(max_entries) + " files",
						 "more");
		}
		std::ranges::sort(found, {}, &Entry::path);
		return found;
	}

	const Disk disk;

private:
	const Space &meta(uint64_t nid) const
	{
		if (!(nid & top_bit))
			return disk.image();
		if (!metabox_)
			disk.image().bad(0, "no inode in a metabox where there is none", hex(nid));
		return *metabox_;
	}

	Content open(uint64_t nid) const
	{
		return Content(disk, meta(nid), packed_ ? &*packed_ : nullptr, inode(nid));
	}

	// Everything in a directory but itself and its parent.
	std::vector<Entry> list(const Entry &directory) const
	{
		const auto content = open(directory.nid);
		if (!S_ISDIR(content.inode().mode))
			content.bad(0, "a directory", hex(content.inode().mode));
		std::vector<Entry> entries;
		std::string last;
		for (uint64_t at = 0; at < content.size(); at += disk.block()) {
			const auto block =
				content.bytes(at, std::min(disk.block(), content.size() - at));
			list_block(content, at, block, directory.path, last, entries);
		}
		return entries;
	}

	static void list_block(const Content &content, uint64_t at, View block,
			       const fs::path &parent, std::string &last,
			       std::vector<Entry> &entries)
	{
		const uint64_t names = block.size() < 12 ? 0 : le<uint16_t>(block, 8);
		if (!names || names % 12 || names >= block.size())
			content.bad(at + 8, "names behind whole entries", std::to_string(names));
		for (uint64_t entry = 0; entry < names; entry += 12) {
			const uint64_t begin = le<uint16_t>(block, entry + 8);
			const bool is_last = entry + 12 == names;
			const uint64_t end =
				is_last ? block.size() : le<uint16_t>(block, entry + 20);
			if (begin < names || begin >= end || end > block.size())
				content.bad(at + entry + 8, "the place of a name",
					    std::to_string(begin) + " to " + std::to_string(end));
			std::string name(reinterpret_cast<const char *>(&block[begin]),
					 end - begin);
			if (is_last)
				name.resize(std::min(name.find('\0'), name.size()));
			if (name.empty() || name.size() > 255 ||
			    name.find_first_of(std::string_view("/\0", 2)) != name.npos)
				content.bad(at + begin, "a name",
					    std::to_string(name.size()) + " bytes that are none");
			if (name <= last)
				content.bad(at + begin, "a name after " + last, name);
			last = name;
			if (name == "." || name == "..")
				continue;
			auto path = parent / name;
			if (path.native().size() > PATH_MAX)
				content.bad(at + begin, "a path of " + std::to_string(PATH_MAX),
					    std::to_string(path.native().size()));
			entries.push_back({std::move(path), le<uint64_t>(block, entry)});
		}
	}

	std::optional<Content> packed_, metabox_, latest_;
};

Image::Image(const fs::path &path, const std::vector<fs::path> &devices)
    : volume_(std::make_unique<Volume>(path, devices))
{
}

Image::Image(Image &&) noexcept = default;

Image::~Image() = default;

std::vector<Entry> Image::files() const
{
	return volume_->files();
}

std::vector<Extent> Image::extents(const Entry &entry) const
{
	return volume_->file(entry.nid).extents();
}

std::vector<std::byte> Image::read(const Entry &entry) const
{
	return read(entry, 0, volume_->file(entry.nid).size());
}

std::vector<std::byte> Image::read(const Entry &entry, uint64_t offset, size_t length) const
{
	const auto &file = volume_->file(entry.nid);
	if (length > max_read)
		file.bad(offset, "a read of up to " + std::to_string(max_read) + " bytes",
			 std::to_string(length));
	return file.bytes(offset, length);
}

} // namespace erofs
