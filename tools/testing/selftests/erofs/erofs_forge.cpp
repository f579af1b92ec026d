// SPDX-License-Identifier: GPL-2.0-only
// Images as the on-disk format allows and mkfs.erofs never makes: written from the tables below.

#include <array>
#include <cstdio>
#include <iostream>
#include <random>
#include <set>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "forge.hpp"

namespace fs = std::filesystem;
using namespace forge;

namespace
{

using Extents = std::vector<Extent>;
using enum Fill;
using enum Layout;

constexpr size_t kBlock = 4096;

template <typename... Lists> Extents join(Lists... lists)
{
	Extents all;
	(all.insert(all.end(), lists.begin(), lists.end()), ...);
	return all;
}

Extents times(size_t count, const Extents &list)
{
	Extents all;
	while (count--)
		all.insert(all.end(), list.begin(), list.end());
	return all;
}

// Extents that end at each of these places, of these algorithms in turn; small ones may be plain.
Extents cut(const std::vector<size_t> &ends, const std::vector<Algorithm> &algorithms,
	    Fill fill = text)
{
	Extents all;
	size_t start = 0;
	for (const auto end : ends) {
		all.push_back(
			smaller(algorithms[all.size() % algorithms.size()], end - start, fill));
		start = end;
	}
	return all;
}

// The same with pclusters of whole blocks: what does not fill one is plain.
Extents cut_blocks(const std::vector<size_t> &ends, Algorithm algorithm, size_t block = kBlock)
{
	Extents all;
	size_t start = 0;
	for (const auto end : ends) {
		const auto length = end - start;
		all.push_back(length < block ? plain(length) : compressed(algorithm, length));
		start = end;
	}
	return all;
}

// Extents of 1 to 600 bytes, each of another kind than the one before.
Extents tiny(size_t total)
{
	std::mt19937_64 rng(total);
	Extents all;
	for (size_t at = 0; at < total;) {
		const auto length = std::min<size_t>(total - at, 1 + rng() % 600);
		switch (rng() % 5) {
		case 0:
			all.push_back(hole(length));
			break;
		case 1:
			all.push_back(plain(length));
			break;
		case 2:
			all.push_back(smaller(Algorithm::zstd, length, text));
			break;
		default:
			all.push_back(smaller(Algorithm::lz4, length, text).after(rng() % 3));
		}
		at += length;
	}
	all.push_back(plain(1));
	return all;
}

// Files that end in each odd place relative to an extent of this many bytes and to the blocks.
std::vector<File> endings(Layout layout, Algorithm algorithm)
{
	std::vector<File> files{{"empty", layout, {}}};
	for (const size_t rest : {1, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193}) {
		const auto suffix = std::to_string(rest);
		files.push_back({"alone-" + suffix, layout, {smaller(algorithm, rest, periodic)}});
		files.push_back({"after-" + suffix,
				 layout,
				 {compressed(algorithm, 5 * kBlock), plain(rest % kBlock + 1)}});
		files.push_back({"long-" + suffix,
				 layout,
				 {plain(kBlock), compressed(algorithm, 9 * kBlock + rest)}});
		files.push_back(
			{.name = "open-" + suffix,
			 .layout = layout,
			 .extents = {plain(kBlock), compressed(algorithm, 9 * kBlock + rest)},
			 .open_end = true});
	}
	return files;
}

constexpr auto kDevicesUnknown = "compressed data of other devices";

const std::vector<size_t> kByteCuts{
	1,	     4095,	   4096,       4097,	     8191,	  8192,
	8193,	     12289,	   65535,      65536,	     65537,	  kMiB - 4097,
	kMiB - 4096, kMiB - 4095,  kMiB - 513, kMiB - 512,   kMiB - 511,  kMiB - 1,
	kMiB,	     kMiB + 1,	   kMiB + 511, kMiB + 512,   kMiB + 4095, kMiB + 4096,
	kMiB + 4097, 2 * kMiB - 1, 2 * kMiB,   2 * kMiB + 1, 3 * kMiB};

// What one start in each lcluster of 4 KiB allows.
const std::vector<size_t> kBefore{
	12287,	  20479,       65535,	     69632,	   kMiB - 8193,	     kMiB - 4097,
	kMiB - 1, kMiB + 4095, kMiB + 12287, 2 * kMiB - 1, 2 * kMiB + 69631, 3 * kMiB - 1};
const std::vector<size_t> kAt{8192,	   12288,	 65536,	   kMiB - 4096,	    kMiB,
			      kMiB + 4096, kMiB + 65536, 2 * kMiB, 2 * kMiB + 4096, 3 * kMiB};
const std::vector<size_t> kBehind{
	4097,	  8193,	       65537,	     69633,	   kMiB - 8191,	     kMiB - 4095,
	kMiB + 1, kMiB + 4097, kMiB + 12289, 2 * kMiB + 1, 2 * kMiB + 69633, 3 * kMiB + 1};

std::vector<File> boundaries(Layout layout, Algorithm algorithm)
{
	return {{"before", layout, cut_blocks(kBefore, algorithm)},
		{"at", layout, cut_blocks(kAt, algorithm)},
		{"behind", layout, cut_blocks(kBehind, algorithm)}};
}

// Plain blocks at the same place in the file and on the device, one per extent.
Extents blocks(size_t count, size_t block = kBlock)
{
	return times(count, {plain(block)});
}

Extents blocks_on(unsigned device, size_t count)
{
	return times(count, {plain(kBlock).on(device)});
}

// Each second extent of another file, the last one first.
Extents backwards(const std::string &owner, size_t count, size_t length)
{
	Extents all;
	while (count -= 2)
		all.push_back(shared(owner, count, length));
	return all;
}

// In layouts where extents may lie anywhere.
Extents blocks_of_records(size_t count, size_t block = kBlock)
{
	return times(count, {plain(block).in_block()});
}

// What the device can read to where it is wanted, beside what it cannot: since it is decoded, since
// it starts or ends elsewhere in a block, or since the device goes on elsewhere.
std::vector<File> plain_runs(size_t block)
{
	const auto shared_blocks = [&](std::initializer_list<size_t> indexes) {
		Extents all;
		for (const auto index : indexes)
			all.push_back(shared("run", index, block));
		return all;
	};
	// Whichever of them comes from elsewhere, its neighbours follow each other on the device.
	Extents woven;
	for (size_t i = 0; i < 60; ++i)
		std::ranges::move(shared_blocks({20 + i, 220 + i}), std::back_inserter(woven));
	std::vector<File> files{
		{"run", full, blocks(300, block)},
		{"woven", full, std::move(woven)},
		{"gaps", full, times(50, {plain(block), plain(block).after(block)})},
		{"turned", full,
		 join(shared_blocks({9, 8, 7, 6, 6, 6, 7, 8, 9, 11, 12, 10, 11, 9, 10, 10}),
		      times(9, {plain(block)}),
		      shared_blocks({0, 1, 2, 3, 5, 7, 299, 0, 299, 298}))},
		{"between", full, times(20, join(blocks(3, block), Extents{lz4(3 * block)}))},
		{"beside", full,
		 times(20, {plain(block), plain(3 * block - 1), plain(block + 1), plain(block),
			    plain(block), lz4(2 * block)})},
		{"large", full,
		 times(5, {plain(16 * block), plain(2 * block), plain(3 * block), lz4(5 * block)})},
		{"large-compact", compact,
		 times(9, {plain(12 * block), plain(2 * block), lz4(5 * block), plain(3 * block)})},
		// which goes on behind what is used of it, and so does the file: but not there
		{"parts",
		 full,
		 {shared("large", 0, 16 * block), shared("large", 0, 2 * block),
		  shared("large", 1, 2 * block), shared("large", 0, 15 * block),
		  shared("large", 2, 2 * block), shared("large", 2, 3 * block),
		  shared("large", 1, 2 * block), shared("large", 2, 3 * block)}},
		{"interlaced", full, times(30, join(blocks(3, block), Extents{lz4(3 * block)})),
		 true}};
	for (const auto rest :
	     std::set<size_t>{1, 511, 512, 513, block / 2, block - 512, block - 1}) {
		if (!rest || rest >= block)
			continue;
		const auto suffix = std::to_string(rest);
		files.push_back(
			{"end-" + suffix, full, join(blocks(5, block), Extents{plain(rest)})});
		files.push_back({"end-large-" + suffix, full,
				 join(blocks(2, block), Extents{plain(3 * block + rest)})});
	}
	return files;
}

// Of any length and at any place, if it is one that starts a block.
std::vector<File> plain_records(size_t block)
{
	std::vector<File> files{
		{"ext4", ext4, blocks_of_records(100, block)},
		{"ext8", ext8,
		 times(30, {plain(block).in_block(), smaller(Algorithm::lz4, block, text),
			    plain(block).in_block().after(block + 1), plain(block).in_block()})},
		{"ext16", ext16,
		 times(10, {plain(block).in_block(), plain(10 * block).in_block(), lz4(2 * block),
			    plain(block), plain(3 * block).in_block(),
			    plain(block).in_block().after(1), plain(block + 100).in_block(),
			    plain(block - 100).in_block(), plain(5 * block).in_block()})},
		{"ext32", ext32,
		 times(10, {plain(7 * block).in_block(), plain(block).after(block),
			    plain(4 * block).in_block(), hole(2 * block),
			    plain(3 * block).in_block(), zstd(9 * block)})},
		{"ext16-interlaced", ext16,
		 times(20, join(blocks(3, block), Extents{lz4(block), plain(block).after(5),
							  plain(2 * block).after(block)})),
		 true},
		{"ext16-end", ext16, {plain(9 * block).in_block(), plain(block + 512).in_block()}},
		{"ext16-end-odd",
		 ext16,
		 {plain(9 * block).in_block(), plain(7 * block + 1).in_block()}}};
	return files;
}

Image maximum(const std::string &name, std::pair<unsigned, unsigned> since, Algorithm algorithm)
{
	return {.name = "maximum-" + name,
		.since = since,
		.files = {{"file",
			   full,
			   {compressed(algorithm, 5000),
			    compressed(algorithm, 12 * kMiB).filling(kMiB),
			    compressed(algorithm, 3 * kMiB).filling(kMiB), plain(3)}},
			  {"compact",
			   compact_2b,
			   {compressed(algorithm, 12 * kMiB, periodic), plain(100)}}}};
}

std::vector<Image> images()
{
	std::vector<Image> all;
	for (const auto &[name, layout, algorithm, since] :
	     {std::tuple{"full-lz4", full, Algorithm::lz4, std::pair{5u, 13u}},
	      {"compact-lz4", compact, Algorithm::lz4, {5u, 13u}},
	      {"compact-2b-zstd", compact_2b, Algorithm::zstd, {6u, 10u}},
	      {"compact-2b-lzma", compact_2b, Algorithm::lzma, {5u, 16u}},
	      {"full-deflate", full, Algorithm::deflate, {6u, 6u}}}) {
		all.push_back({.name = std::string("boundaries-") + name,
			       .since = since,
			       .files = boundaries(layout, algorithm)});
		all.push_back({.name = std::string("endings-") + name,
			       .since = since,
			       .files = endings(layout, algorithm)});
	}
	all.push_back(maximum("lz4", {5, 13}, Algorithm::lz4));
	all.push_back(maximum("lzma", {5, 16}, Algorithm::lzma));
	all.push_back(maximum("deflate", {6, 6}, Algorithm::deflate));
	all.push_back(maximum("zstd", {6, 10}, Algorithm::zstd));

	all.push_back(
		{.name = "heads",
		 .since = {6, 10},
		 .files = {
			 {"lz4-zstd", full,
			  times(20, {lz4(9000), zstd(20000), plain(4096), lz4(5000),
				     zstd(70000, mixed)})},
			 {"lzma-deflate", compact,
			  times(8, {lzma(90000), deflate(70001), plain(4096), lzma(40000, mixed)})},
			 {"zstd-lz4", compact_2b,
			  times(20, {zstd(30000), lz4(9000), lz4(12345), plain(4096)})},
			 // only one of the two may be big
			 {"big-head1", full, times(9, {lz4(150000), zstd(4100), plain(4096)})},
			 {"big-head2", full, times(9, {zstd(4100), lz4(150000), plain(4096)})}}});

	all.push_back(
		{.name = "plain",
		 .since = {6, 15},
		 .files = {{"shifted", full,
			    times(40, {lz4(6001), plain(4095), plain(4096), lz4(4101)})},
			   {"shifted-big", compact,
			    times(4, {lz4(6001), plain(65536), lz4(10000), plain(100001)})},
			   {"interlaced", full,
			    times(40, {lz4(6001), plain(4095), plain(4096), lz4(4101)}), true},
			   {"ext16", ext16,
			    times(40, {lz4(1001), plain(4095), plain(100).after(5), plain(1)}),
			    true}}});
	for (const unsigned bits : {9u, 10u, 12u}) {
		const auto block = size_t{1} << bits;
		auto files = plain_runs(block);
		std::ranges::move(plain_records(block), std::back_inserter(files));
		// the biggest one, since hardly any memory is needed for the others
		files.push_back({"data", full, times(3, {lz4(kMiB + 1)})});
		all.push_back({.name = "plain-" + std::to_string(block),
			       .since = {6, 15},
			       .files = std::move(files),
			       .block_bits = bits});
	}
	// Whoever reads whole pclusters of the second device reads blocks of 4 KiB.
	all.push_back({.name = "plain-devices",
		       .since = {6, 15},
		       .files = {{"shifted", full,
				  times(20, {plain(512), plain(9 * kBlock).on(1), plain(2 * 512),
					     plain(kBlock).on(1)})},
				 {"ext16", ext16,
				  times(20, {plain(1), plain(5 * kBlock).on(1), lz4(12345),
					     plain(3 * kBlock).on(1)})},
				 {"straight", full, times(300, {plain(kBlock).on(1)})},
				 {"data", full,
				  times(3, {lz4(kMiB).filling(64 * kKiB).on(1), plain(512)})}},
		       .block_bits = 9,
		       .devices = {(1 << 20) + 3},
		       .unknown_to_fsck = kDevicesUnknown});
	all.push_back(
		{.name = "interlaced",
		 .since = {6, 15},
		 .files = {{"big", compact_2b,
			    times(4, {lz4(6001), plain(65536), lz4(10000), plain(100001)}), true},
			   {"1m",
			    full,
			    {lz4(5555), plain(kMiB), plain(kMiB - 4097), lz4(100000)},
			    true},
			   // the last of their blocks comes first on the device
			   {"aligned", full,
			    times(5, {plain(65536), plain(4096), plain(8192), lz4(12288)}), true},
			   {"ext16", ext16,
			    times(20, {lz4(1001), plain(4097), plain(100).after(5), plain(70000)}),
			    true}},
		 .unknown_to_fsck = "interlaced pclusters of more than a block"});

	all.push_back(
		{.name = "holes",
		 .since = {7, 3},
		 .files = {{"full",
			    full,
			    {lz4(53248), hole(8192), lz4(28672), hole(3 * kMiB + 1), lz4(12287),
			     hole(1 * kMiB), zstd(100001)}},
			   {"full-odd", full,
			    times(30, {lz4(8192), hole(4097), plain(8191 - 4096), hole(8192)})},
			   {"compact",
			    compact,
			    {lz4(50000), hole(12288), lz4(30000), hole(3 * kMiB), lz4(40000),
			     hole(9999)}},
			   {"compact-2b",
			    compact_2b,
			    {hole(12288), lz4(30000), hole(3 * kMiB), lz4(40000), hole(9999),
			     lz4(9999)}},
			   {"only", full, {hole(1 * kMiB + 17)}},
			   {"largest", ext16, {lz4(100), hole(16 * kMiB), lz4(100)}},
			   {"ext8", ext8, times(40, {lz4(4096), hole(4096), plain(4096)})},
			   {"ext4", ext4, times(40, {lz4(4096), hole(4096), plain(4096)})},
			   {"ext32", ext32, times(200, {lz4(2000), hole(1), plain(1), hole(777)})},
			   {"data", full, times(20, {lz4(kMiB + 1)})}},
		 .unknown_to_fsck = "holes in lcluster indexes"});
	// Found when others of the same window have been looked up: at once, and after a while.
	all.push_back(
		{.name = "unknown",
		 .since = {6, 15},
		 .files = {{"soon",
			    ext32,
			    {lz4(300000), lz4(30000).unknown(), lz4(30000), lz4(40000)}},
			   {"late", ext32,
			    [] {
				    auto extents = times(150, {lz4(20), zstd(2000), lz4(3000)});
				    extents.insert(extents.begin(), lz4(5000).unknown());
				    return extents;
			    }()}},
		 .unknown_to_fsck = "an unknown algorithm",
		 .damaged = true});
	// Where only who asks for the end of an extent should notice that something is wrong there.
	all.push_back(
		{.name = "torn",
		 .since = {6, 15},
		 .files = {{"lz4", full, times(2, {lz4(300000).torn(), lz4(70000)})},
			   {"lz4-compact", compact, times(3, {lz4(100001).torn(), lz4(9000)})},
			   {"zstd", compact, times(2, {zstd(500000).torn(), zstd(70000)})},
			   {"deflate", full, times(2, {deflate(300000).torn(), deflate(70000)})},
			   {"lzma", full, times(2, {lzma(300000).torn(), lzma(70000)})},
			   {"records", ext16, times(2, {lz4(300000).torn(), zstd(500000).torn()})},
			   {"lost", ext16, times(9, {lz4(100000), lz4(100000).lost()})},
			   {"early", full,
			    times(5, {deflate(300000).early(), lzma(70000).early()})},
			   {"early-compact", compact,
			    times(5, {lz4(300000).early(), zstd(70001).early()})},
			   {"indexes", full, times(9, {lz4(32000, noise).bloated(), lz4(70000)})},
			   {"indexes-compact", compact,
			    times(2, {lz4(128000, noise).bloated(), lz4(30000)})}},
		 .unknown_to_fsck = "damaged data",
		 .damaged = true});
	all.push_back({.name = "holes-inside",
		       .since = {7, 3},
		       .files = {{"file", full, {lz4(50000), hole(8192), lz4(30000)}},
				 {"short", full, {lz4(20480), hole(8192), lz4(4096), hole(8192)}}},
		       .unknown_to_fsck = "holes in lcluster indexes"});

	all.push_back(
		{.name = "tails",
		 .since = {6, 10},
		 .files = {{"lz4", compact, {lz4(65536), lz4(5000), lz4(900).inlined()}},
			   {"plain", full, {lz4(65536), lz4(5000), plain(700).inlined()}},
			   {"zstd-2b", compact_2b, {zstd(kMiB + 1), zstd(4095 + 900).inlined()}},
			   {"only", full, {lz4(1234).inlined()}},
			   {"only-plain", compact, {plain(1).inlined()}},
			   {"over-a-page", full, {lz4(4095 + 8192), zstd(4098).inlined()}},
			   // at the same place in a block as in the file, but not to be read by a
			   // device
			   {"block", full, {lz4(4096), plain(4096).inlined()}},
			   {"long", full, {lz4(12287), lz4(100000, periodic).inlined()}},
			   {"extended", full, {lz4(99999), lz4(2999).inlined()}, false, 0, true}}});

	all.push_back(
		{.name = "fragments",
		 .since = {6, 15},
		 .files = {{"tail", compact, {lz4(65536), fragment(17, 5000)}},
			   {"tail-full", full, {lz4(70000), plain(3800), fragment(100001, 5000)}},
			   {"over-a-page", full, {lz4(4096), fragment(4095, 4097)}},
			   {"one-byte", compact, {lz4(8192), fragment(kMiB, 1)}},
			   {"whole", compact, {fragment(3, 100)}},
			   {"whole-big", compact, {fragment(4097, 2 * kMiB)}},
			   {"whole-1", full, {fragment(kMiB - 1, 1)}},
			   {"ext4", ext4, {lz4(4096), plain(4096), fragment(99, 1000)}},
			   {"ext8", ext8, {lz4(4096), plain(4096), fragment(99, 4096)}},
			   {"ext16", ext16, {lz4(777), fragment(5, 2 * kMiB)}},
			   {"ext32", ext32, {fragment(6, 70000)}},
			   {"data", full, times(3, {lz4(kMiB + 1)})}},
		 .packed =
			 File{"(packed)", compact, {lz4(kMiB + 1), plain(4095), zstd(2 * kMiB)}}});

	all.push_back(
		{.name = "shared",
		 .since = {6, 15},
		 .files = {{"owner",
			    full,
			    {zstd(300001), lz4(kMiB).filling(256 * kKiB), plain(4096)}},
			   {"again",
			    full,
			    {shared("owner", 1, 9000), shared("owner", 0, 300001), plain(4096),
			     shared("owner", 1, kMiB), shared("owner", 1, kMiB - 1),
			     shared("owner", 2, 4096), shared("owner", 0, 8193)}},
			   {"ours",
			    full,
			    {lz4(100000), shared("ours", 0, 99999), shared("ours", 0, 12288),
			     shared("ours", 0, 8193), shared("again", 2, 4095)}},
			   {"bytes", ext16,
			    join(times(50, {shared("owner", 1, 1), shared("owner", 0, 3),
					    shared("bytes-owner", 1, 99), lz4(1000)}),
				 Extents{shared("owner", 1, 999999)})},
			   {"bytes-owner", ext32, {lz4(500), deflate(5000).after(7), plain(10)}},
			   {"interlaced",
			    full,
			    {lz4(5001), plain(4096), lz4(4096), shared("interlaced", 1, 4095)},
			    true}}});

	std::vector<File> extents{
		{"cuts-lz4", ext16, cut(kByteCuts, {Algorithm::lz4})},
		{"cuts-zstd", ext32, cut(kByteCuts, {Algorithm::zstd})},
		{"cuts-all", ext16,
		 cut(kByteCuts,
		     {Algorithm::lz4, Algorithm::lzma, Algorithm::deflate, Algorithm::zstd},
		     mixed)},
		{"ext8", ext8,
		 times(64, {lz4(4096), plain(4096), zstd(4096), lzma(4096).after(3)})},
		{"ext4", ext4, times(64, {lz4(4096), plain(4096), zstd(4096), deflate(4096)})},
		{"ext4-last", ext4, {lz4(4096), plain(1)}},
		{"ext8-16k", ext8, times(32, {lz4(16384), plain(16384), zstd(16384)}), false, 2},
		{"ext4-1m",
		 ext4,
		 {lz4(kMiB), zstd(kMiB, mixed), deflate(kMiB), plain(999)},
		 false,
		 8}};
	all.push_back({.name = "extents", .since = {6, 15}, .files = std::move(extents)});
	all.push_back({.name = "endings-extents",
		       .since = {6, 15},
		       .files = endings(ext16, Algorithm::lz4)});
	all.push_back(
		{.name = "maximum-extents",
		 .since = {6, 15},
		 .files = {{"file",
			    ext16,
			    {plain(3), lz4(12 * kMiB).filling(kMiB), plain(1), zstd(1234)}}}});

	all.push_back(
		{.name = "tiny",
		 .since = {6, 15},
		 .files = {{"ext16", ext16, tiny(kMiB)}, {"ext32", ext32, tiny(kMiB + 12345)}}});

	// Each pcluster starts and ends in a block of its neighbours.
	all.push_back(
		{.name = "unaligned",
		 .since = {6, 15},
		 .files = {{"lz4", ext16,
			    times(30, {lz4(30000).after(1), plain(4095), lz4(70001).after(4095)})},
			   {"lzma", ext16,
			    times(6, {lzma(30000).after(1), plain(4095),
				      lzma(70001, mixed).after(13)})},
			   {"deflate", ext16,
			    times(9, {deflate(30000), plain(1), deflate(70001, mixed).after(511)})},
			   {"zstd", ext16,
			    times(9, {zstd(30000), plain(513), zstd(70001, mixed).after(512)})}}});

	for (const unsigned bits : {9u, 10u, 11u, 14u, 16u}) {
		const auto block = size_t{1} << bits;
		const auto large = bits > 12 ? "blocks larger than a page" : "";
		const auto some = [&](Algorithm algorithm, Algorithm other) {
			return times(60, {compressed(algorithm, 3 * block + 1), plain(block - 1),
					  compressed(other, 17 * block - 1), plain(1)});
		};
		all.push_back(
			{.name = "block-" + std::to_string(block),
			 .since = {6, 10},
			 .files = {{"full", full, some(Algorithm::lz4, Algorithm::zstd)},
				   {"compact", bits > 14 ? full : compact,
				    some(Algorithm::zstd, Algorithm::lz4)},
				   {"interlaced", full, some(Algorithm::lz4, Algorithm::deflate),
				    true},
				   {"tail", full, {lz4(17 * block), lz4(block / 2).inlined()}},
				   {"fragment",
				    full,
				    {lz4(17 * block), fragment(block - 1, block + 1)}},
				   {"whole", compact, {fragment(1, 5 * block - 2)}},
				   {"large",
				    full,
				    {lz4(2 * kMiB).filling(kMiB - block), plain(1)}}},
			 .block_bits = bits,
			 .packed = File{"(packed)", full, {lz4(10 * block), lzma(10 * block)}},
			 .unknown_to_fsck = large});
		all.push_back(
			{.name = "block-" + std::to_string(block) + "-extents",
			 .since = {6, 15},
			 .files = {{"cuts", ext16,
				    cut(kByteCuts, {Algorithm::lz4, Algorithm::zstd})},
				   {"interlaced", ext16,
				    times(50, {lz4(1001), plain(block - 1), plain(100).after(5)}),
				    true},
				   {"tiny", ext32, tiny(100000)}},
			 .block_bits = bits,
			 .unknown_to_fsck = large});
	}

	// An lcluster of several blocks.
	all.push_back(
		{.name = "lclusters",
		 .since = {6, 10},
		 .files = {
			 {"full-8k", full, times(30, {lz4(20481), plain(4095), lz4(40960)}), false,
			  1},
			 {"full-16k", full, times(30, {zstd(70000), lz4(40001)}), false, 2},
			 {"compact-8k", compact, times(30, {zstd(50000), lz4(20001)}), false, 1},
			 {"compact-16k", compact, times(30, {lz4(70000), lz4(50001)}), false, 2}}});

	const std::vector both_ends{shared("end", 0, kBlock),	shared("end", 1, kBlock),
				    shared("end", 2, kBlock),	shared("begin", 0, kBlock),
				    shared("begin", 1, kBlock), shared("begin", 2, kBlock)};
	all.push_back(
		{.name = "devices",
		 .since = {5, 16},
		 .files = {{"begin", full, blocks_on(2, 3)},
			   {"spread", full,
			    times(20, {lz4(30000).on(1), lz4(9000), plain(4000).on(2),
				       lz4(70000).on(2), lz4(5000).on(1)})},
			   {"first", compact, times(20, {lz4(30000), lz4(9000), plain(4096)})},
			   {"one", full, times(20, {lz4(99999).on(1), plain(4096).on(1)})},
			   {"inline", full, {lz4(65536).on(2), lz4(900).inlined()}},
			   // the next block has the next number, but of another device
			   {"turns", full,
			    join(blocks_on(2, 1),
				 times(50, join(blocks_on(1, 1), blocks_on(2, 1))))},
			   {"end", full, blocks_on(1, 3)},
			   {"backwards", full, backwards("one", 40, 99999)},
			   {"across", full, both_ends},
			   // .. and both have their indexes in one pack
			   {"across-compact", compact, both_ends}},
		 .devices = {1 << 20, 0},
		 .unknown_to_fsck = kDevicesUnknown});

	// Addresses that take more than 32 bits of blocks, and of bytes.
	constexpr auto kFar = size_t{1} << 32;
	all.push_back(
		{.name = "far",
		 .since = {6, 15},
		 .files = {{"ext16", ext16,
			    times(40, {lz4(30000).on(1), zstd(9000), plain(4000).on(1)})},
			   {"ext32", ext32,
			    times(40, {lz4(777).on(1).after(9), lz4(65536), plain(1).on(1)})},
			   {"near", full, {lz4(100000)}},
			   {"plain", ext16,
			    times(9, {plain(kBlock).in_block().on(1),
				      plain(9 * kBlock).in_block().on(1)})},
			   {"fragment", ext32, {lz4(5000), fragment(kFar + 17, 70000)}}},
		 .packed =
			 File{"(packed)", ext32, {lz4(100000), hole(kFar - 100000), zstd(100000)}},
		 .devices = {(uint64_t{1} << 32) + 12345},
		 .unknown_to_fsck = kDevicesUnknown});

	for (const auto layout : {flat, compact, full})
		all.push_back({.name = std::string("metabox-") + (layout == flat      ? "flat"
								  : layout == compact ? "compact"
										      : "full"),
			       .since = {6, 17},
			       .files = {{"full", full, times(60, {lz4(9001), plain(4096)}), false,
					  0, false, true},
					 {"compact", compact, times(60, {lz4(9001), plain(4096)}),
					  false, 0, false, true},
					 {"ext16", ext16, tiny(300000), false, 0, false, true},
					 {"tail",
					  full,
					  {lz4(65536), lz4(900).inlined()},
					  false,
					  0,
					  false,
					  true},
					 {"tail-block",
					  full,
					  {lz4(4096), plain(4096, text).inlined()},
					  false,
					  0,
					  false,
					  true},
					 {"tail-plain",
					  compact,
					  {lz4(65536), plain(777).inlined()},
					  false,
					  0,
					  true,
					  true},
					 {"fragment",
					  compact,
					  {lz4(8192), fragment(9, 9999)},
					  false,
					  0,
					  false,
					  true},
					 {"outside", compact, {lz4(kMiB)}}},
			       .packed = File{"(packed)", compact, {lz4(100000)}},
			       .metabox = Metabox{layout, Algorithm::lz4,
						  layout == full ? 5001ul : 65536ul},
			       .unknown_to_fsck = "compressed tails in a metabox"});
	return all;
}

nlohmann::json describe(const Image &image)
{
	return {{"name", image.name},
		{"since", {image.since.first, image.since.second}},
		{"block", image.block()},
		{"devices", image.devices.size()},
		{"unknown_to_fsck", image.unknown_to_fsck},
		{"damaged", image.damaged}};
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{
		"Writes EROFS images that mkfs.erofs never makes, and what their files contain"};
	std::string out, only;
	bool list = false;
	auto *where = app.add_option("--out", out, "directory for NAME/image.erofs and NAME/files");
	app.add_option("--only", only, "this image only");
	app.add_flag("--list", list, "print what there is as JSON, write nothing")->excludes(where);
	CLI11_PARSE(app, argc, argv);
	try {
		if (list == !out.empty())
			throw std::runtime_error("name a directory with --out, or give --list");
		auto found = nlohmann::json::array();
		for (const auto &image : images()) {
			if (!only.empty() && image.name != only)
				continue;
			found.push_back(describe(image));
			if (!list)
				write(image, fs::path(out) / image.name);
		}
		if (found.empty())
			throw std::runtime_error("--only " + only + ": no such image, see --list");
		if (list)
			std::cout << found.dump(1) << '\n';
		return 0;
	} catch (const std::exception &error) {
		std::cerr << "erofs_forge: " << error.what() << '\n';
		return 1;
	}
}
