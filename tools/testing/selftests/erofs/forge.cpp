// SPDX-License-Identifier: GPL-2.0-only
#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <span>

#include <lz4hc.h>
#include <lzma.h>
#include <zlib.h>
#include <zstd.h>

#include "forge.hpp"
#include "io.hpp"

namespace fs = std::filesystem;

namespace forge
{
namespace
{

using Bytes = std::vector<std::byte>;
using View = std::span<const std::byte>;
using Kind = Extent::Kind;
using Damage = Extent::Damage;

// Also a multiple of 2^32 pages of up to 64 KiB.
constexpr uint64_t kLost = uint64_t{1} << 48;

constexpr size_t kSuper = 1024;
constexpr size_t kDeviceSlot = 128, kDeviceTable = 10 * kDeviceSlot;
constexpr size_t kDataStart = 4096; // behind superblock, configurations and device table
constexpr size_t kInodeSlot = 32;
constexpr size_t kPage = 4096;
constexpr size_t kMaxEncoded = kMiB, kMaxDecoded = 12 * kMiB;
constexpr unsigned kLzmaDictionary = 1 << 20;
constexpr unsigned kZstdWindowLog = 20, kZstdWindowLogMin = 10;
constexpr uint64_t kMetaboxNid = uint64_t{1} << 63;

enum Incompat : uint32_t {
	kZeroPadding = 0x1,
	kConfigurations = 0x2, // and big pclusters
	kDevices = 0x8,	       // and HEAD2
	kTails = 0x10,
	kFragments = 0x20, // and partial references
	k48Bit = 0x80,
	kMetabox = 0x100,
};
enum Advise : uint16_t {
	kCompact2b = 0x1,
	kExtents = 0x1,
	kBig1 = 0x2,
	kBig2 = 0x4,
	kInline = 0x8,
	kInterlaced = 0x10,
	kFragment = 0x20,
};
enum LclusterType : uint8_t { kPlain, kHead1, kNonhead, kHead2 };
constexpr uint16_t kPartialRef = 1 << 15, kHole = 1 << 14, kBlockCount = 1 << 11;
// A greater distance would look like a block count; who follows it asks again there.
constexpr size_t kMaxDistance = kBlockCount - 1;
constexpr uint32_t kExtentPartial = 1 << 27;
constexpr unsigned kExtentFormat = 28;

size_t up(size_t value, size_t unit)
{
	return (value + unit - 1) / unit * unit;
}

// Append a little-endian number.
template <typename T> void put(Bytes &to, uint64_t value)
{
	for (size_t i = 0; i < sizeof(T); ++i)
		to.push_back(static_cast<std::byte>(value >> (8 * i)));
}

template <typename T> void set(Bytes &in, size_t offset, uint64_t value)
{
	for (size_t i = 0; i < sizeof(T); ++i)
		in.at(offset + i) = static_cast<std::byte>(value >> (8 * i));
}

void append(Bytes &to, View what)
{
	to.insert(to.end(), what.begin(), what.end());
}

// ---- content --------------------------------------------------------------------------------

class Author
{
public:
	explicit Author(std::string_view seed) : rng_(crc32(0, nullptr, 0))
	{
		rng_.seed(crc32(0, reinterpret_cast<const Bytef *>(seed.data()),
				static_cast<uInt>(seed.size())));
	}

	Bytes write(Fill fill, size_t length)
	{
		Bytes out;
		out.reserve(length);
		while (out.size() < length)
			piece(fill, length - out.size(), out);
		out.resize(length);
		return out;
	}

	// Periodic data in which every stripe starts with its share of so much noise.
	Bytes diluted(size_t length, size_t noise)
	{
		constexpr size_t kStripe = 32 * kKiB;
		auto out = write(Fill::periodic, length);
		for (size_t at = 0; at < length; at += kStripe) {
			const auto share = std::min(kStripe, length - at) * noise / length;
			const auto bytes = write(Fill::noise, share);
			std::ranges::copy(bytes, out.begin() + static_cast<ptrdiff_t>(at));
		}
		return out;
	}

private:
	size_t below(size_t limit) { return rng_() % limit; }

	void piece(Fill fill, size_t most, Bytes &out)
	{
		switch (fill) {
		case Fill::text:
			return words(out);
		case Fill::noise:
			return put<uint64_t>(out, rng_());
		case Fill::zeros:
			return out.resize(out.size() + most);
		case Fill::periodic:
			return period(out);
		case Fill::mixed:
			const auto run = std::min(most, 1 + below(below(8) ? 500 : 20000));
			const auto next = std::array{Fill::text, Fill::text, Fill::noise,
						     Fill::zeros}[below(4)];
			return append(out, write(next, run));
		}
	}

	void words(Bytes &out)
	{
		// few words are used often, as in a language
		size_t word = below(1 + below(600)) * 2654435761;
		for (size_t letters = 2 + word % 9; letters--; word = word / 7 + letters)
			out.push_back(static_cast<std::byte>('a' + word % 23));
		out.push_back(static_cast<std::byte>(below(9) ? ' ' : '\n'));
	}

	void period(Bytes &out)
	{
		if (period_.empty())
			period_ = write(Fill::noise, 1000);
		put<uint32_t>(out, periods_++);
		append(out, period_);
	}

	std::mt19937_64 rng_;
	Bytes period_;
	size_t periods_ = 0;
};

// ---- compression ----------------------------------------------------------------------------

void done(bool good, std::string_view what, size_t input)
{
	if (!good)
		throw Error(what, 0, "an encoded extent of " + std::to_string(input) + " bytes",
			    "an error");
}

size_t encode_lzma(View in, std::span<std::byte> out)
{
	lzma_options_lzma options;
	lzma_lzma_preset(&options, 3);
	options.dict_size = kLzmaDictionary;
	lzma_stream stream = LZMA_STREAM_INIT;
	const std::unique_ptr<lzma_stream, void (*)(lzma_stream *)> end(&stream, lzma_end);
	done(lzma_microlzma_encoder(&stream, &options) == LZMA_OK, "liblzma", in.size());
	stream.next_in = reinterpret_cast<const uint8_t *>(in.data());
	stream.avail_in = in.size();
	stream.next_out = reinterpret_cast<uint8_t *>(out.data());
	stream.avail_out = out.size();
	done(lzma_code(&stream, LZMA_FINISH) == LZMA_STREAM_END && stream.total_in == in.size(),
	     "liblzma", in.size());
	return stream.total_out;
}

size_t encode_deflate(View in, std::span<std::byte> out)
{
	z_stream stream{};
	done(deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 9, Z_DEFAULT_STRATEGY) == Z_OK,
	     "zlib", in.size());
	const std::unique_ptr<z_stream, int (*)(z_stream *)> end(&stream, deflateEnd);
	stream.next_in =
		const_cast<Bytef *>(reinterpret_cast<const Bytef *>(in.data())); // an old interface
	stream.avail_in = static_cast<uInt>(in.size());
	stream.next_out = reinterpret_cast<Bytef *>(out.data());
	stream.avail_out = static_cast<uInt>(out.size());
	done(::deflate(&stream, Z_FINISH) == Z_STREAM_END, "zlib", in.size());
	return stream.total_out;
}

size_t encode_zstd(View in, std::span<std::byte> out)
{
	const std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx *)> context(ZSTD_createCCtx(),
									  ZSTD_freeCCtx);
	ZSTD_CCtx_setParameter(context.get(), ZSTD_c_compressionLevel, 5);
	ZSTD_CCtx_setParameter(context.get(), ZSTD_c_windowLog, kZstdWindowLog);
	const auto size =
		ZSTD_compress2(context.get(), out.data(), out.size(), in.data(), in.size());
	done(!ZSTD_isError(size), "libzstd", in.size());
	return size;
}

Bytes encode(Algorithm algorithm, View in)
{
	Bytes out(in.size() + in.size() / 16 + 1024);
	size_t size = 0;
	switch (algorithm) {
	case Algorithm::lz4:
		size = static_cast<size_t>(LZ4_compress_HC(
			reinterpret_cast<const char *>(in.data()),
			reinterpret_cast<char *>(out.data()), static_cast<int>(in.size()),
			static_cast<int>(out.size()), 9));
		break;
	case Algorithm::lzma:
		size = encode_lzma(in, out);
		break;
	case Algorithm::deflate:
		size = encode_deflate(in, out);
		break;
	case Algorithm::zstd:
		size = encode_zstd(in, out);
		break;
	}
	// decoders take leading zeros for padding
	done(size && out[0] != std::byte{}, "compressor", in.size());
	out.resize(size);
	return out;
}

// ---- extents --------------------------------------------------------------------------------

bool byte_granular(Layout layout)
{
	return layout >= Layout::ext4;
}

size_t record_size(Layout layout)
{
	return size_t{4} << (static_cast<unsigned>(layout) - static_cast<unsigned>(Layout::ext4));
}

// An extent with its data: where that is, and what it decodes to.
struct Cluster {
	Extent extent;
	uint64_t start = 0; // in the file
	Bytes content{};
	uint64_t pa = 0; // within its device until all of them have their places
	size_t plen = 0;
	Bytes tail{};

	bool has_place() const { return plen && !extent.tail; }
	bool encoded() const { return extent.kind == Kind::compressed; }
	bool is(Kind kind) const { return extent.kind == kind; }
};

struct Node {
	const File *file;
	std::vector<Cluster> clusters{};
	uint64_t size = 0;
	uint64_t nid = 0;
	std::array<std::optional<Algorithm>, 2> heads{};

	[[noreturn]] void fail(size_t index, std::string_view expected, std::string_view got) const
	{
		const auto start = index < clusters.size() ? clusters[index].start : size;
		throw Error(file->name + ", extent " + std::to_string(index),
			    static_cast<off_t>(start), expected, got);
	}
};

// One entry of the full and compact indexes.
struct Lcluster {
	LclusterType type = kNonhead;
	const Cluster *cluster = nullptr;
	bool end = false;	     // looks like a HEAD at the place where the file ends
	size_t offset = 0;	     // HEAD: of the extent's start
	size_t back = 0, ahead = 0;  // NONHEAD: lclusters to its head and to the next one
	std::optional<size_t> count; // the first NONHEAD of big pclusters: blocks

	bool starts() const { return cluster || end; }
	size_t back_field() const { return count ? kBlockCount | *count : capped(back); }
	size_t ahead_field() const { return count ? kBlockCount | *count : capped(ahead); }
	static size_t capped(size_t distance) { return std::min(distance, kMaxDistance); }
};

class Writer
{
public:
	explicit Writer(const Image &image) : image_(image), devices_(1 + image.devices.size())
	{
		devices_[0].resize(up(kDataStart, block()));
	}

	void write(const fs::path &directory)
	{
		if (image_.packed)
			nodes_.push_back(place(*image_.packed));
		for (const auto &file : image_.files)
			nodes_.push_back(place(file));
		for (auto &device : devices_)
			device.resize(up(device.size(), std::max(block(), kPage)));
		share();
		settle();
		for (auto &node : nodes_)
			if (node.file->in_metabox)
				add_inode(node, metabox_, kMetaboxNid);
		std::optional<Node> box;
		if (image_.metabox)
			box = place_metabox();
		for (auto &node : nodes_)
			if (!node.file->in_metabox)
				add_inode(node, metadata_, 0);
		if (box)
			add_inode(*box, metadata_, 0);
		const auto root = add_root();
		meta_block_ = devices_[0].size() / block();
		append(devices_[0], metadata_);
		devices_[0].resize(up(devices_[0].size(), std::max(block(), kPage)));
		finish(root, box ? box->nid : 0);
		save(directory);
	}

private:
	size_t block() const { return image_.block(); }
	size_t lcluster_bits(const File &file) const
	{
		return image_.block_bits + file.lcluster_bits;
	}

	// ---- data

	Bytes invent(const Cluster &cluster, Author &author)
	{
		const auto &extent = cluster.extent;
		if (!extent.encoded)
			return author.write(extent.fill, extent.length);
		size_t low = 0, high = extent.encoded; // bytes of noise that fit, and too many
		const Author fresh = author;
		while (high - low > 64) {
			const auto middle = low + (high - low) / 2;
			const auto size = encode(extent.algorithm,
						 Author(fresh).diluted(extent.length, middle))
						  .size();
			(size <= extent.encoded ? low : high) = middle;
		}
		return author.diluted(extent.length, low);
	}

	Node place(const File &file)
	{
		Node node{&file};
		for (size_t i = 0; i < file.extents.size(); ++i) {
			auto &cluster = node.clusters.emplace_back(file.extents[i], node.size);
			if (!cluster.extent.length)
				node.fail(i, "a length", "0");
			if (cluster.extent.device >= devices_.size())
				node.fail(i, "a device of the image",
					  std::to_string(cluster.extent.device));
			node.size += cluster.extent.length;
			Author author(image_.name + '/' + file.name + '/' + std::to_string(i));
			if (cluster.is(Kind::hole) && !packed(node))
				cluster.content.resize(cluster.extent.length);
			else if (cluster.is(Kind::fragment))
				cluster.content = fragment(node, i);
			else if (!cluster.is(Kind::shared) && !cluster.is(Kind::hole))
				cluster.content = invent(cluster, author);
			store(node, i);
		}
		return node;
	}

	bool packed(const Node &node) const
	{
		return image_.packed && node.file == &*image_.packed;
	}

	// Holes of the packed inode, which may be larger than memory, have no content here.
	Bytes fragment(const Node &node, size_t index) const
	{
		if (nodes_.empty() || !packed(nodes_[0]))
			node.fail(index, "a packed inode", "none");
		const auto &extent = node.clusters[index].extent;
		const auto end = extent.from + extent.length;
		if (end > nodes_[0].size)
			node.fail(index, "a part of the packed inode", std::to_string(extent.from));
		Bytes all(extent.length);
		for (const auto &cluster : nodes_[0].clusters) {
			const auto from = std::max<uint64_t>(extent.from, cluster.start);
			const auto to =
				std::min<uint64_t>(end, cluster.start + cluster.content.size());
			if (from < to)
				std::ranges::copy(
					View(cluster.content)
						.subspan(from - cluster.start, to - from),
					all.begin() + static_cast<ptrdiff_t>(from - extent.from));
		}
		return all;
	}

	void store(Node &node, size_t index)
	{
		auto &cluster = node.clusters[index];
		auto &extent = cluster.extent;
		const auto granular = byte_granular(node.file->layout);
		if (node.file->layout == Layout::flat) {
			extent.kind = Kind::plain;
			return append_data(cluster, cluster.content, index ? 1 : block(), 0);
		}
		if (extent.kind == Kind::compressed || extent.kind == Kind::smaller) {
			auto content = std::span(std::as_const(cluster.content));
			if (extent.damage == Damage::early)
				content = content.first(content.size() - 512);
			auto data = encode(extent.algorithm, content);
			if (extent.damage == Damage::torn)
				tear(data);
			const auto fits = data.size() <= extent.length;
			if (fits || extent.kind == Kind::compressed) {
				extent.kind = Kind::compressed;
				check_sizes(node, index, data.size());
				choose_head(node, index);
				return store_bytes(cluster, data, granular, true);
			}
			extent.kind = Kind::plain;
		}
		if (extent.kind != Kind::plain)
			return;
		check_sizes(node, index, extent.length);
		// what shares blocks with others cannot be interlaced
		const bool interlaced =
			node.file->interlaced && !extent.tail && !(granular && extent.gap);
		store_bytes(cluster, interlaced ? interlace(cluster) : cluster.content,
			    granular && !interlaced, false);
	}

	static void tear(Bytes &data)
	{
		const auto last = std::span(data).last(data.size() / 4);
		std::ranges::fill(last, std::byte{0xff});
	}

	void check_sizes(const Node &node, size_t index, size_t size) const
	{
		const auto &extent = node.clusters[index].extent;
		if (size > kMaxEncoded)
			node.fail(index, "an encoded size of 1 MiB at most", std::to_string(size));
		if (extent.length > kMaxDecoded)
			node.fail(index, "12 MiB at most", std::to_string(extent.length));
		if (extent.encoded && up(size, block()) != extent.encoded)
			node.fail(index, std::to_string(extent.encoded), std::to_string(size));
	}

	void choose_head(Node &node, size_t index)
	{
		const auto algorithm = node.clusters[index].extent.algorithm;
		algorithms_ |= 1u << static_cast<unsigned>(algorithm);
		for (auto &head : node.heads) {
			if (head.value_or(algorithm) != algorithm)
				continue;
			head = algorithm;
			return;
		}
		if (!byte_granular(node.file->layout))
			node.fail(index, "two algorithms in one file", "another one");
	}

	// Each byte at the place in its block that it has in the block of the file; what lies in
	// front of the first block boundary goes into the last block, which has room for it.
	Bytes interlace(const Cluster &cluster) const
	{
		Bytes out(up(cluster.content.size(), block()));
		for (size_t i = 0; i < cluster.content.size(); ++i)
			out[(i + cluster.start % block() + out.size() - block()) % out.size()] =
				cluster.content[i];
		return out;
	}

	void store_bytes(Cluster &cluster, const Bytes &data, bool granular, bool pad_front)
	{
		if (cluster.extent.tail) {
			cluster.tail = data;
			cluster.plen = data.size();
			return;
		}
		const auto gap = cluster.extent.gap;
		if (granular)
			return append_data(cluster, data, cluster.extent.at_block ? block() : 1,
					   gap);
		Bytes padded(up(data.size(), block()));
		const auto front = pad_front ? padded.size() - data.size() : 0;
		std::ranges::copy(data, padded.begin() + static_cast<ptrdiff_t>(front));
		append_data(cluster, padded, block(), gap);
	}

	void append_data(Cluster &cluster, View data, size_t alignment, size_t gap)
	{
		auto &device = devices_[cluster.extent.device];
		device.resize(up(device.size() + gap, alignment));
		cluster.pa = device.size();
		cluster.plen = data.size();
		append(device, data);
	}

	// ---- addresses

	void share()
	{
		for (auto &node : nodes_)
			for (size_t i = 0; i < node.clusters.size(); ++i)
				if (node.clusters[i].is(Kind::shared))
					share(node, i);
	}

	void share(Node &node, size_t index)
	{
		auto &cluster = node.clusters[index];
		const auto owner = std::ranges::find(nodes_, cluster.extent.owner,
						     [](const Node &n) { return n.file->name; });
		if (owner == nodes_.end() || cluster.extent.from >= owner->clusters.size())
			node.fail(index, "an extent of an existing file", cluster.extent.owner);
		const auto &source = owner->clusters[cluster.extent.from];
		if (!source.has_place() || source.is(Kind::shared))
			node.fail(index, "an extent with a pcluster", "another one");
		if (cluster.extent.length > source.content.size())
			node.fail(index, "at most " + std::to_string(source.content.size()),
				  std::to_string(cluster.extent.length));
		const bool interlaced = owner->file->interlaced;
		if (source.is(Kind::plain) &&
		    (interlaced != node.file->interlaced ||
		     (interlaced && source.start % block() != cluster.start % block())))
			node.fail(index, "the same place in a block", "another one");
		cluster.pa = source.pa;
		cluster.plen = source.plen;
		cluster.extent.device = source.extent.device;
		cluster.extent.algorithm = source.extent.algorithm;
		cluster.content.assign(source.content.begin(),
				       source.content.begin() +
					       static_cast<ptrdiff_t>(cluster.extent.length));
		partial_.insert({&cluster, source.is(Kind::compressed)});
		if (source.encoded())
			choose_head(node, index);
	}

	// Make the places within devices those in the address space of the filesystem.
	void settle()
	{
		uint64_t end = 0;
		for (size_t i = 1; i < devices_.size(); ++i) {
			const auto first = image_.devices[i - 1] ? image_.devices[i - 1] : end;
			first_block_.push_back(first);
			end = first + devices_[i].size() / block();
		}
		for (auto &node : nodes_)
			for (auto &cluster : node.clusters)
				if (const auto device = cluster.extent.device)
					cluster.pa += first_block_[device - 1] * block();
	}

	// ---- indexes

	bool compressed_data(const Cluster &cluster) const
	{
		const auto found = partial_.find(&cluster);
		return found == partial_.end() ? cluster.encoded() : found->second;
	}

	LclusterType type(const Node &node, const Cluster &cluster) const
	{
		if (cluster.is(Kind::hole) || cluster.is(Kind::fragment))
			return kHead1;
		if (!compressed_data(cluster))
			return kPlain;
		return node.heads[0] == cluster.extent.algorithm ? kHead1 : kHead2;
	}

	// Whether pclusters of this type may have more than a block.
	bool big(const Node &node, LclusterType wanted) const
	{
		const bool both = node.file->layout != Layout::full;
		for (const auto &cluster : node.clusters) {
			const bool same = (type(node, cluster) == kHead1) == (wanted == kHead1);
			const bool one = !cluster.extent.tail && cluster.plen == block();
			const bool needed =
				(cluster.has_place() && !one) || (both && cluster.is(Kind::hole));
			if (needed && (both || same))
				return true;
		}
		return false;
	}

	std::vector<Lcluster> lclusters(const Node &node) const
	{
		const auto bits = lcluster_bits(*node.file);
		const auto count = up(node.size, size_t{1} << bits) >> bits;
		std::vector<Lcluster> all(count);
		for (size_t i = 0; i < node.clusters.size(); ++i) {
			const auto &cluster = node.clusters[i];
			auto &head = all.at(cluster.start >> bits);
			if (head.cluster)
				node.fail(i, "one start of an extent in an lcluster", "two");
			head.type = type(node, cluster);
			head.cluster = &cluster;
			head.offset = cluster.start & ((size_t{1} << bits) - 1);
		}
		if (count && (!all[0].cluster || all[0].offset))
			node.fail(0, "a first extent of an lcluster", "a shorter one");
		if (count && !all.back().cluster && !node.file->open_end) {
			all.back().offset = node.size & ((size_t{1} << bits) - 1);
			all.back().end = all.back().offset;
			if (all.back().end)
				all.back().type = kPlain;
		}
		size_t head = 0;
		for (size_t i = 0; i < count; ++i)
			if (all[i].starts())
				head = i;
			else
				all[i].back = i - head;
		size_t next = count;
		for (size_t i = count; i--;)
			if (all[i].starts())
				next = i;
			else
				all[i].ahead = next - i;
		count_blocks(node, all);
		return all;
	}

	void count_blocks(const Node &node, std::vector<Lcluster> &all) const
	{
		for (size_t i = 0; i < all.size(); ++i) {
			const auto *cluster = all[i].cluster;
			if (!cluster)
				continue;
			const auto index = static_cast<size_t>(cluster - node.clusters.data());
			const auto blocks = cluster->has_place() ? cluster->plen / block() : 0;
			const bool room = i + 1 < all.size() && !all[i + 1].starts();
			if (blocks >= kBlockCount)
				node.fail(index, "fewer than 2048 blocks", std::to_string(blocks));
			if (room && big(node, all[i].type))
				all[i + 1].count = blocks;
			else if (cluster->has_place() && blocks != 1)
				node.fail(index, "an lcluster without start for the block count",
					  std::to_string(blocks) + " blocks");
			else if (cluster->is(Kind::hole) && node.file->layout != Layout::full)
				node.fail(index, "an lcluster without start in a hole", "none");
			const bool longer = cluster->has_place() && compressed_data(*cluster) &&
					    !partial_.contains(cluster) &&
					    cluster->extent.length < cluster->plen &&
					    cluster->start + cluster->extent.length < node.size;
			const bool bloated = cluster->extent.damage == Damage::bloated;
			if (longer != bloated)
				node.fail(index,
					  bloated ? "more compressed than decoded data"
						  : "no more compressed than decoded data",
					  std::to_string(cluster->plen));
		}
	}

	uint16_t advise(const Node &node) const
	{
		uint16_t bits = node.file->interlaced ? kInterlaced : 0;
		if (node.clusters.empty())
			return bits;
		if (node.clusters.back().is(Kind::fragment))
			bits |= kFragment;
		if (byte_granular(node.file->layout)) {
			const auto size = std::countr_zero(record_size(node.file->layout)) - 2;
			return bits | kExtents | static_cast<uint16_t>(size << 1);
		}
		if (node.file->layout == Layout::compact_2b)
			bits |= kCompact2b;
		if (big(node, kHead1))
			bits |= kBig1;
		if (big(node, kPlain))
			bits |= kBig2;
		if (node.clusters.back().extent.tail)
			bits |= kInline;
		return bits;
	}

	Bytes map_header(const Node &node) const
	{
		Bytes out;
		const auto &last = node.clusters.back();
		const bool granular = byte_granular(node.file->layout);
		if (last.is(Kind::fragment) && node.clusters.size() == 1 && !granular) {
			put<uint64_t>(out, last.extent.from | uint64_t{1} << 63);
			return out;
		}
		if (record_size(node.file->layout) >= 16 && granular)
			put<uint32_t>(out, node.clusters.size());
		else if (last.is(Kind::fragment))
			put<uint32_t>(out, last.extent.from);
		else
			put<uint32_t>(out, uint64_t{last.tail.size()} << 16);
		put<uint16_t>(out, advise(node));
		if (granular && record_size(node.file->layout) >= 16) {
			put<uint16_t>(out, 0);
			return out;
		}
		const auto number = [&](size_t i) {
			return node.heads[i] ? static_cast<unsigned>(*node.heads[i]) : 0;
		};
		put<uint8_t>(out, granular ? 0 : number(0) | number(1) << 4);
		put<uint8_t>(out, node.file->lcluster_bits);
		return out;
	}

	void full(const Node &node, Bytes &out) const
	{
		put<uint64_t>(out, 0);
		for (const auto &one : lclusters(node)) {
			if (one.end) {
				put<uint16_t>(out, one.type);
				put<uint16_t>(out, one.offset);
				put<uint32_t>(out, 0);
				continue;
			}
			if (!one.cluster) {
				put<uint16_t>(out, kNonhead);
				put<uint16_t>(out, 0);
				put<uint16_t>(out, one.back_field());
				put<uint16_t>(out, Lcluster::capped(one.ahead));
				continue;
			}
			const auto &cluster = *one.cluster;
			unsigned flags = one.type;
			flags |= partial_.contains(&cluster) ? kPartialRef : 0;
			flags |= cluster.is(Kind::hole) ? kHole : 0;
			put<uint16_t>(out, flags);
			put<uint16_t>(out, one.offset);
			put<uint32_t>(out, cluster.is(Kind::fragment) ? cluster.extent.from >> 32
					   : cluster.has_place()      ? cluster.pa / block()
								      : 0);
		}
	}

	void compact(const Node &node, Bytes &out, size_t base) const
	{
		const auto all = lclusters(node);
		// slots are reckoned in blocks, also where lclusters are larger
		const auto slots = up(node.size, block()) / block();
		const size_t first = (32 - base % 32) / 4 % 8;
		const bool two = node.file->layout == Layout::compact_2b && first < slots;
		const auto end_2b = two ? first + (slots - first) / 16 * 16 : 0;
		for (size_t i = 0; i < slots;) {
			const bool dense = i >= first && i < end_2b;
			const size_t entries = dense ? 16 : 2, size = dense ? 32 : 8;
			pack(node, all, i, entries, size, out);
			i += entries;
		}
	}

	void pack(const Node &node, const std::vector<Lcluster> &all, size_t from, size_t entries,
		  size_t size, Bytes &out) const
	{
		const auto low = std::max<size_t>(lcluster_bits(*node.file), 12);
		const auto width = (size - 4) * 8 / entries;
		const bool is_big = big(node, kHead1);
		const auto start = out.size();
		size_t before = is_big ? 0 : 1; // blocks between the base and the next head
		std::optional<uint64_t> base;
		out.resize(start + size);
		for (size_t i = 0; i < entries && from + i < all.size(); ++i) {
			const auto &one = all[from + i];
			const auto field = one.starts()	      ? one.offset
					   : i + 1 == entries ? one.ahead_field()
							      : one.back_field();
			const uint64_t value = (uint64_t{one.type} << low | field)
					       << (width * i % 8);
			for (size_t byte = 0; byte * 8 < width + 8 && byte < 4; ++byte)
				out[start + width * i / 8 + byte] |=
					static_cast<std::byte>(value >> (8 * byte));
			const bool single =
				from + i + 1 == all.size() || all[from + i + 1].starts();
			if (one.cluster && one.cluster->has_place()) {
				const auto here = one.cluster->pa / block();
				if (here != base.value_or(here - before) + before)
					node.fail(static_cast<size_t>(one.cluster -
								      node.clusters.data()),
						  "pclusters of a pack in one piece", "a gap");
				base = here - before;
			}
			if (one.count)
				before += *one.count;
			else if (one.cluster && (!is_big || single))
				++before;
		}
		set<uint32_t>(out, start + size - 4, base.value_or(0));
	}

	uint32_t plen_field(const Cluster &cluster) const
	{
		if (cluster.is(Kind::fragment))
			return static_cast<uint32_t>(cluster.extent.from);
		auto value = static_cast<uint32_t>(cluster.plen);
		if (compressed_data(cluster))
			value |= (cluster.extent.damage == Damage::unknown
					  ? 15
					  : static_cast<uint32_t>(cluster.extent.algorithm) + 1)
				 << kExtentFormat;
		if (partial_.contains(&cluster))
			value |= kExtentPartial;
		return value;
	}

	void extents(const Node &node, Bytes &out, size_t base) const
	{
		const auto size = record_size(node.file->layout);
		const auto unit = size_t{1} << lcluster_bits(*node.file);
		out.resize(up(base + out.size(), size) - base);
		uint64_t next = 0;
		for (size_t i = 0; i < node.clusters.size(); ++i) {
			const auto &cluster = node.clusters[i];
			const bool odd =
				cluster.extent.length != unit && i + 1 != node.clusters.size();
			if (size < 16 && (odd || cluster.extent.length > unit))
				node.fail(i, "extents of one lcluster each", "another length");
			if (cluster.extent.tail)
				node.fail(i, "indexes of lclusters for a tail", "extents");
			if (size == 4 && !i)
				put<uint64_t>(out, next = cluster.pa);
			if (size == 4 && cluster.has_place() && cluster.pa != next)
				node.fail(i, "pclusters in one piece", "a gap");
			next += cluster.plen;
			auto pa =
				cluster.is(Kind::fragment) ? cluster.extent.from >> 32 : cluster.pa;
			if (cluster.extent.damage == Damage::lost)
				pa += kLost;
			put<uint32_t>(out, plen_field(cluster));
			if (size >= 8)
				put<uint32_t>(out, pa);
			if (size >= 16) {
				put<uint32_t>(out, pa >> 32);
				put<uint32_t>(out, cluster.start);
			}
			if (size == 32) {
				put<uint32_t>(out, cluster.start >> 32);
				out.resize(out.size() + 12);
			}
		}
	}

	// ---- inodes

	static unsigned data_layout(Layout layout)
	{
		if (layout == Layout::flat)
			return 0;
		return layout == Layout::compact || layout == Layout::compact_2b ? 3 : 1;
	}

	Bytes inode(const Node &node, uint16_t mode, uint64_t number) const
	{
		const auto layout = data_layout(node.file->layout);
		uint64_t blocks = 0;
		for (const auto &cluster : node.clusters)
			blocks += cluster.has_place() ? up(cluster.plen, block()) / block() : 0;
		if (!layout)
			blocks = node.clusters.empty() ? 0 : node.clusters[0].pa / block();
		const bool extended = node.file->extended || node.size >> 32;
		Bytes out;
		put<uint16_t>(out, (extended ? 1 : 0) | layout << 1);
		put<uint16_t>(out, 0);
		put<uint16_t>(out, mode);
		put<uint16_t>(out, extended ? blocks >> 32 : 1);
		if (extended) {
			put<uint64_t>(out, node.size);
			put<uint32_t>(out, blocks);
			put<uint32_t>(out, number);
			out.resize(44);
			put<uint32_t>(out, 1); // links
			out.resize(64);
			return out;
		}
		put<uint32_t>(out, node.size);
		put<uint32_t>(out, 0);
		put<uint32_t>(out, blocks);
		put<uint32_t>(out, number);
		out.resize(32);
		return out;
	}

	Bytes with_indexes(const Node &node, size_t place, uint16_t mode)
	{
		auto out = inode(node, mode, ++inodes_);
		const auto layout = node.file->layout;
		if (layout == Layout::flat)
			return out;
		if (node.clusters.empty()) {
			out.resize(out.size() + 8);
			return out;
		}
		append(out, map_header(node));
		if (byte_granular(layout))
			extents(node, out, place);
		else if (node.clusters.size() == 1 && node.clusters[0].is(Kind::fragment))
			return out;
		else if (layout == Layout::full)
			full(node, out);
		else
			compact(node, out, place + out.size());
		return out;
	}

	// A tail must not cross a block boundary: try one place after the other.
	void add_inode(Node &node, Bytes &area, uint64_t flag)
	{
		const auto tail = node.clusters.empty() ? View() : View(node.clusters.back().tail);
		if (tail.size() > block())
			node.fail(node.clusters.size() - 1, "a tail that fits into a block",
				  std::to_string(tail.size()));
		for (auto place = up(area.size(), kInodeSlot);; place += kInodeSlot) {
			auto out = with_indexes(node, place, S_IFREG | 0444);
			if ((place + out.size()) % block() + tail.size() > block())
				continue;
			area.resize(place);
			append(area, out);
			append(area, tail);
			node.nid = place / kInodeSlot | flag;
			return;
		}
	}

	Node place_metabox()
	{
		metabox_.resize(up(metabox_.size(), kPage));
		const auto unit = image_.metabox->extent;
		box_ = File{"(metabox)", image_.metabox->layout, {}};
		Node node{&box_};
		for (size_t at = 0; at < metabox_.size(); at += unit) {
			const auto length = std::min(unit, metabox_.size() - at);
			auto &cluster = node.clusters.emplace_back(
				smaller(image_.metabox->algorithm, length), at);
			const auto part = View(metabox_).subspan(at, length);
			cluster.content.assign(part.begin(), part.end());
			node.size += length;
			store(node, node.clusters.size() - 1);
		}
		devices_[0].resize(up(devices_[0].size(), std::max(block(), kPage)));
		return node;
	}

	struct Entry {
		std::string name;
		uint64_t nid;
		uint8_t type;
	};

	// The data of a directory come before all inodes, but need their numbers.
	uint64_t add_root()
	{
		const auto nid = up(metadata_.size(), kInodeSlot) / kInodeSlot;
		if (nid > UINT16_MAX && !long_addresses())
			throw Error("root", 0, "a number of 16 bits", std::to_string(nid));
		std::vector<Entry> entries{{".", nid, 2}, {"..", nid, 2}};
		for (const auto &node : nodes_)
			if (!packed(node))
				entries.push_back({node.file->name, node.nid, 1});
		std::ranges::sort(entries, {}, &Entry::name);
		Bytes data;
		for (auto rest = std::span(entries); !rest.empty();)
			rest = rest.subspan(add_directory_block(rest, data));
		devices_[0].resize(up(devices_[0].size(), block()));
		const auto first = devices_[0].size() / block();
		append(devices_[0], data);
		const File file{"(root)", Layout::flat, {}};
		Node node{&file};
		node.size = data.size();
		node.clusters.emplace_back(plain(data.size())).pa = first * block();
		auto out = inode(node, S_IFDIR | 0555, ++inodes_);
		set<uint16_t>(out, 6, 2);
		metadata_.resize(nid * kInodeSlot);
		append(metadata_, out);
		return nid;
	}

	size_t add_directory_block(std::span<const Entry> entries, Bytes &data) const
	{
		constexpr size_t kEntry = 12;
		size_t count = 0, used = 0;
		while (count < entries.size() &&
		       used + kEntry + entries[count].name.size() <= block())
			used += kEntry + entries[count++].name.size();
		size_t name = count * kEntry;
		const auto start = data.size();
		for (const auto &entry : entries.first(count)) {
			put<uint64_t>(data, entry.nid);
			put<uint16_t>(data, name);
			put<uint16_t>(data, entry.type);
			name += entry.name.size();
		}
		for (const auto &entry : entries.first(count))
			append(data, std::as_bytes(std::span(entry.name)));
		data.resize(start + block());
		return count;
	}

	// ---- superblock

	bool any(auto predicate) const
	{
		return std::ranges::any_of(nodes_, [&](const Node &node) {
			return std::ranges::any_of(node.clusters, [&](const Cluster &cluster) {
				return predicate(node, cluster);
			});
		});
	}

	bool long_addresses() const
	{
		return any([](const Node &node, const Cluster &) {
			       return byte_granular(node.file->layout);
		       }) ||
		       image_.metabox;
	}

	uint32_t features() const
	{
		uint32_t bits = kZeroPadding | kConfigurations;
		if (!image_.devices.empty() || any([](const Node &node, const Cluster &) {
			    return node.heads[1].has_value();
		    }))
			bits |= kDevices;
		if (any([](const Node &, const Cluster &cluster) { return cluster.extent.tail; }))
			bits |= kTails;
		if (image_.packed || !partial_.empty())
			bits |= kFragments;
		if (image_.metabox)
			bits |= kMetabox;
		if (long_addresses())
			bits |= k48Bit;
		return bits;
	}

	void configurations(Bytes &out) const
	{
		const auto add = [&](Algorithm algorithm, size_t size, auto &&...fields) {
			if (!(algorithms_ >> static_cast<unsigned>(algorithm) & 1))
				return;
			out.resize(up(out.size(), 4));
			put<uint16_t>(out, size);
			const auto start = out.size();
			(fields(out), ...);
			out.resize(start + size);
		};
		add(Algorithm::lz4, 14, [&](Bytes &to) {
			put<uint16_t>(to, 65535);
			put<uint16_t>(to, kMaxEncoded / block());
		});
		add(Algorithm::lzma, 14, [](Bytes &to) { put<uint32_t>(to, kLzmaDictionary); });
		add(Algorithm::deflate, 6, [](Bytes &to) { put<uint8_t>(to, MAX_WBITS); });
		add(Algorithm::zstd, 6, [](Bytes &to) {
			put<uint8_t>(to, 0);
			put<uint8_t>(to, kZstdWindowLog - kZstdWindowLogMin);
		});
	}

	void finish(uint64_t root, uint64_t metabox)
	{
		Bytes out;
		const auto blocks = devices_[0].size() / block();
		put<uint32_t>(out, 0xe0f5e1e2);
		put<uint32_t>(out, 0); // checksum
		put<uint32_t>(out, 1); // there is one
		put<uint8_t>(out, image_.block_bits);
		put<uint8_t>(out, image_.metabox ? 1 : 0);
		put<uint16_t>(out, long_addresses() ? 0 : root);
		put<uint64_t>(out, inodes_);
		put<uint64_t>(out, 0);
		put<uint32_t>(out, 0);
		put<uint32_t>(out, blocks);
		put<uint32_t>(out, meta_block_);
		out.resize(80); // no shared xattrs, no UUID, no name
		put<uint32_t>(out, features());
		put<uint16_t>(out, algorithms_);
		put<uint16_t>(out, image_.devices.size());
		put<uint16_t>(out, image_.devices.empty() ? 0 : kDeviceTable / kDeviceSlot);
		out.resize(96);
		put<uint64_t>(out, image_.packed ? nodes_[0].nid : 0);
		out.resize(112);
		put<uint64_t>(out, long_addresses() ? root : 0);
		put<uint64_t>(out, 0);
		if (image_.metabox) {
			put<uint64_t>(out, metabox);
			put<uint64_t>(out, 0);
		}
		configurations(out);
		auto &primary = devices_[0];
		std::ranges::copy(out, primary.begin() + kSuper);
		for (size_t i = 1; i < devices_.size(); ++i)
			add_device(i);
		const auto covered = block() > kSuper ? block() - kSuper : block();
		set<uint32_t>(primary, kSuper + 4,
			      checksum(View(primary).subspan(kSuper + 8, covered - 8)));
	}

	void add_device(size_t index)
	{
		auto &primary = devices_[0];
		const auto slot = kDeviceTable + (index - 1) * kDeviceSlot;
		const auto name = "device" + std::to_string(index);
		const auto blocks = devices_[index].size() / block();
		const auto first = first_block_[index - 1];
		std::ranges::copy(std::as_bytes(std::span(name)),
				  primary.begin() + static_cast<ptrdiff_t>(slot));
		set<uint32_t>(primary, slot + 64, blocks);
		set<uint32_t>(primary, slot + 68, first);
		set<uint16_t>(primary, slot + 72, blocks >> 32);
		set<uint16_t>(primary, slot + 74, first >> 32);
	}

	// CRC-32C of what follows the checksum; its start value stands for what comes before.
	static uint32_t checksum(View bytes)
	{
		uint32_t crc = 0x5045b54a;
		for (const auto byte : bytes) {
			crc ^= std::to_integer<uint32_t>(byte);
			for (int bit = 0; bit < 8; ++bit)
				crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
		}
		return crc;
	}

	// ---- files

	static void save(const fs::path &path, std::span<const Bytes> parts)
	{
		const Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644),
			    path.string());
		off_t at = 0;
		for (const auto &part : parts)
			for (auto rest = View(part); !rest.empty();) {
				const auto wrote = ::write(fd, rest.data(), rest.size());
				if (wrote <= 0)
					throw Error(path.string(), at, "room", errno_text(errno));
				rest = rest.subspan(static_cast<size_t>(wrote));
				at += wrote;
			}
	}

	void save(const fs::path &directory) const
	{
		const auto files = directory / "files";
		fs::create_directories(files);
		for (const auto &node : nodes_) {
			if (packed(node))
				continue;
			std::vector<Bytes> parts;
			for (const auto &cluster : node.clusters)
				parts.push_back(cluster.content);
			save(files / node.file->name, parts);
		}
		save(directory / "image.erofs", std::span(devices_).first(1));
		for (size_t i = 1; i < devices_.size(); ++i)
			save(directory / ("device" + std::to_string(i) + ".img"),
			     std::span(devices_).subspan(i, 1));
	}

	const Image &image_;
	std::vector<Bytes> devices_; // the primary one first
	std::vector<uint64_t> first_block_;
	std::vector<Node> nodes_; // the packed inode first
	// shared extents, and whether their data is compressed; nodes do not move any more
	std::map<const Cluster *, bool> partial_;
	// number 0 stands for no inode
	Bytes metadata_ = Bytes(kInodeSlot), metabox_;
	File box_;
	uint64_t meta_block_ = 0, inodes_ = 0;
	unsigned algorithms_ = 0;
};

} // namespace

void write(const Image &image, const fs::path &directory)
{
	try {
		Writer(image).write(directory);
	} catch (const Error &error) {
		throw std::runtime_error(image.name + ": " + error.what());
	}
}

} // namespace forge
