// SPDX-License-Identifier: GPL-2.0-only
// Direct reads of every file of a mounted image, compared with the files it was made from.

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <functional>
#include <random>
#include <set>
#include <thread>

#include <CLI/CLI.hpp>
#include <sys/uio.h>
#include <sys/utsname.h>

#include "async.hpp"
#include "io.hpp"
#include "ktap.hpp"
#include "leaks.hpp"
#include "reads.hpp"
#include "target.hpp"
#include "trace.hpp"

namespace fs = std::filesystem;
using std::size_t;
using Result = std::optional<std::string>;

namespace
{

const fs::path kFaults = "/sys/kernel/debug/fail_page_alloc";

std::string reader(const Target &target, std::string_view how, size_t step)
{
	return target.path.string() + ", one of several readers, " + std::string(how) + " by " +
	       std::to_string(step);
}

// In order, several requests at a time.
template <typename Ring>
void read_queued(const Target &target, std::string_view how, int fd, size_t step, size_t end)
{
	constexpr size_t kDepth = 8;
	const auto name = reader(target, how, step);
	const Mapping memory(kDepth * step);
	std::array<iovec, kDepth> places{};
	std::array<size_t, kDepth> offsets{};
	Ring queue(kDepth);
	size_t next = 0;
	const auto submit = [&](size_t slot) {
		if (next >= end)
			return;
		const auto place = memory.bytes().subspan(slot * step, step);
		places[slot] = {place.data(), place.size()};
		offsets[slot] = std::exchange(next, next + step);
		queue.submit({slot, fd, offsets[slot], {&places[slot], 1}});
	};
	for (size_t slot = 0; slot < kDepth; ++slot)
		submit(slot);
	while (queue.in_flight()) {
		const auto [slot, got] = queue.wait();
		const auto want = target.expect(offsets[slot], step);
		errno = static_cast<int>(-got);
		expect(name, offsets[slot], "bytes", static_cast<ssize_t>(want.size()), got);
		expect_bytes(name, offsets[slot], want, memory.bytes().subspan(slot * step, step));
		submit(slot);
	}
}

// A page that comes to the page cache again has been dropped before it was used, and decoded twice:
// only where two windows meet in a folio.
class CachedOnce
{
public:
	explicit CachedOnce(const Target &target)
	    : path_(target.path), added_(kEvent, "i_ino == " + std::to_string(inode(target)))
	{
	}
	void check() const
	{
		std::set<size_t> seen;
		size_t again = 0;
		for (const auto &line : EventTrace::lines(" mm_filemap_add_to_page_cache: "))
			for (size_t first = EventTrace::number(line, " ofs=") / kPage, i = 0;
			     i < size_t{1} << EventTrace::number(line, " order="); ++i)
				again += !seen.insert(first + i).second;
		if (seen.empty())
			throw Error(path_.string(), 0, "pages that come to the cache", "none");
		if (again > seen.size() / 8)
			throw Error(path_.string(), 0,
				    std::to_string(seen.size()) + " pages cached once",
				    std::to_string(again) + " of them again");
	}

private:
	static ino_t inode(const Target &target)
	{
		struct stat info;
		if (::fstat(target.fd, &info))
			throw Error(target.path.string(), 0, "fstat", errno_text(errno));
		return info.st_ino;
	}

	static constexpr std::string_view kEvent = "filemap/mm_filemap_add_to_page_cache";
	fs::path path_;
	EventTrace added_;
};

class Tester
{
public:
	Tester(const fs::path &mount, const fs::path &truth, uint64_t seed)
	    : targets_(open_all(mount, truth)), rng_(seed),
	      arena_(2 * kGuard + std::max(biggest().size(), 8 * kMiB) + kMiB),
	      pattern_(noise(arena_.bytes().size(), seed)), judge_(pattern_)
	{
		refill();
	}

	void check(const Target &target, const Call &call)
	{
		target.uncache();
		check_as_it_is(target, call);
	}

	void check_as_it_is(const Target &target, const Call &call)
	{
		++reads_;
		const auto parts = call.parts(arena_.bytes());
		const auto answer =
			::preadv(target.fd, parts.data(), static_cast<int>(parts.size()),
				 static_cast<off_t>(call.offset));
		if (const auto wrong =
			    judge_(arena_.bytes(), target, call, answer < 0 ? -errno : answer))
			fail(call, *wrong);
	}

	Result every_offset()
	{
		for (const auto &target : targets_)
			for (const auto offset : offsets(target))
				for (const auto length : lengths(target, offset))
					check(target, {target.name, offset, {{0, length}}});
		return {};
	}

	Result memory_alignment()
	{
		for (const auto &target : targets_)
			for (const size_t skew : {512u, 64u, 4u, 1u, 2048u, 3584u, 4092u, 4095u})
				for (const auto &[offset, length] : ranges(target))
					check(target, {target.name, offset, {{skew, length}}});
		return {};
	}

	Result segments()
	{
		for (const auto &target : targets_)
			for (const auto &[offset, length] : ranges(target))
				for (const auto &layout : layouts(length))
					check(target, {target.name, offset, layout});
		return {};
	}

	// The last byte written to a place read twice is that of the segment listed last.
	Result overlapping_segments()
	{
		const auto before = reads_;
		for (const auto &target : targets_) {
			// The device itself writes into the buffers of the others, in any order.
			if (!target.compressed)
				continue;
			const auto block = target.block;
			for (const auto &[at, length] :
			     {std::pair{size_t{0}, block}, {block, 4 * block}, {512, 16 * block}})
				check(target, {target.name, 0, {{0, length}, {at, length}}});
		}
		return reads_ == before ? Result("no file of this image is compressed") : Result();
	}

	Result end_of_file()
	{
		for (const auto &target : targets_) {
			const auto end = target.aligned_size();
			const std::set<size_t> offsets{end,
						       end + target.block,
						       end + 16 * kMiB,
						       target.size(),
						       target.size() + 1,
						       end - std::min(end, target.block),
						       end - std::min(end, 5 * target.block)};
			// far behind the end, one file is as good as any
			const auto far = &target == &biggest() ? 8 * kMiB : 16 * kPage;
			for (const auto offset : offsets)
				for (const size_t length :
				     {target.block, size_t{512}, size_t{1}, 3 * target.block, far})
					check(target, {target.name, offset, {{0, length}}});
		}
		return {};
	}

	// Buffered reads that are dropped behind return the same bytes and leave nothing, either.
	Result paths_taken()
	{
		const PathTrace trace;
		const auto before = reads_;
		for (const auto &target : targets_) {
			if (!target.compressed || !target.size())
				continue;
			const auto block = target.block;
			expect_path(target, 0, {{0, 8 * kMiB}}, "direct");
			expect_path(target, 0, {{512, block}}, "direct");
			expect_path(target, 0, {{0, 512}, {kPage, 2 * block - 512}}, "direct");
			expect_path(target, 0, {{kPage, block}, {0, block}}, "direct");
			expect_path(target, (target.size() - 1) / block * block, {{0, block}},
				    "direct");
			expect_path(target, target.size() - 1, {{0, 513}}, "misaligned");
			expect_path(target, 0, {{1, block}}, "misaligned");
			expect_path(target, 0, {{0, 2 * block}, {512, 2 * block}}, "overlap");
		}
		return reads_ == before ? Result("no file of this image is compressed") : Result();
	}

	// Of an extent that goes beyond a read, the rest is kept for the next one of the same file.
	Result sequential_reads()
	{
		const auto &target = biggest();
		for (const size_t step : {target.block, 5 * target.block, 64 * size_t{1024},
					  64 * size_t{1024} + target.block, 3 * kMiB}) {
			const auto end = std::min({target.size(), 6 * kMiB, 400 * step});
			const Fd fd(target.path, O_RDONLY | O_DIRECT);
			// a dozen reads, then some that another reader disturbs
			for (size_t done = 0, count = 0; done < end; ++count) {
				if (count % 7 == 3)
					std::ofstream("/proc/sys/vm/drop_caches") << 2;
				if (count % 13 == 12)
					read_at(target, fd, pick(end) / target.block * target.block,
						step);
				done += read_at(target, fd, done, step);
			}
			Threads readers;
			// what is in use must not be shrunk
			const std::jthread shrinker([](const std::stop_token &stop) {
				while (!stop.stop_requested())
					std::ofstream("/proc/sys/vm/drop_caches") << 2;
			});
			for (size_t i = 0; i < 4; ++i)
				readers.start([&] {
					read_singly(target, reader(target, "pread", step), fd, step,
						    end);
				});
			if (step < kMiB && Aio::available())
				readers.start(
					[&] { read_queued<Aio>(target, "AIO", fd, step, end); });
			if (step < kMiB && Uring::available())
				readers.start([&] {
					read_queued<Uring>(target, "io_uring", fd, step, end);
				});
			readers.join();
		}
		return {};
	}

	// Wholly or in part: copied or decoded, it is the same.
	Result cached_data()
	{
		const auto before = reads_;
		for (const auto &target : targets_) {
			if (!target.compressed)
				continue;
			for (const auto &[offset, length] : ranges(target)) {
				target.uncache();
				check_buffered(target, offset + length / 2, kPage);
				check_as_it_is(target, {target.name, offset, {{0, length}}});
				check_buffered(target, offset, length);
				check_as_it_is(target, {target.name, offset, {{512, length}}});
			}
			target.uncache();
		}
		return reads_ == before ? Result("no file of this image is compressed") : Result();
	}

	Result whole_files_in_order()
	{
		for (const auto &target : targets_) {
			const Fd fd(target.path, O_RDONLY | O_DIRECT);
			size_t done = 0;
			for (ssize_t got; (got = ::read(fd, aligned(), kMiB)) != 0;
			     done += static_cast<size_t>(got)) {
				++reads_;
				// behind an unaligned end a plain file may refuse
				if (got < 0 && errno == EINVAL && !target.compressed &&
				    done % target.block)
					break;
				if (got < 0)
					throw Error(target.path.string(), static_cast<off_t>(done),
						    "data", errno_text(errno));
				expect_truth(target, done, aligned(), static_cast<size_t>(got));
			}
			expect_value(target, "bytes in all", target.size(), done);
			expect_value(target, "file position", target.size(),
				     static_cast<size_t>(::lseek(fd, 0, SEEK_CUR)));
			[[maybe_unused]] const auto ignored =
				::pread(fd, aligned(), target.block, 0);
			expect_value(target, "file position after pread", target.size(),
				     static_cast<size_t>(::lseek(fd, 0, SEEK_CUR)));
		}
		return {};
	}

	Result empty_reads()
	{
		for (const auto &target : targets_) {
			const auto end = target.aligned_size() + target.block;
			for (const size_t offset : {size_t{0}, size_t{1}, target.size(), end})
				check(target, {target.name, offset, {}});
			check(target, {target.name, 0, {{0, 0}, {512, 0}}});
			check(target, {target.name, 1, {{1, 0}}});
		}
		return {};
	}

	Result bad_addresses()
	{
		const Mapping none(4 * kMiB, PROT_NONE);
		const Mapping constant(4 * kMiB, PROT_READ);
		for (const auto &target : targets_) {
			if (!target.size())
				continue;
			for (const size_t length : {target.block, 4 * target.block, 4 * kMiB}) {
				expect_fault(target, none.bytes().first(length));
				expect_fault(target, constant.bytes().first(length));
			}
			expect_prefix(target, target.block, target.block);
			expect_prefix(target, kMiB, kMiB);
			expect_prefix(target, kPage, 2 * kMiB);
		}
		expect_bytes("read-only memory", 0, std::vector<std::byte>(4 * kMiB),
			     constant.bytes());
		return {};
	}

	// What the page holds is the reader's own fault; the rest of the world must not notice.
	Result same_page_twice()
	{
		const Fd memory(::memfd_create("page", MFD_CLOEXEC), "memfd");
		if (::ftruncate(memory, 3 * kPage))
			throw Error("memfd", 0, "ftruncate", errno_text(errno));
		const Mapping first(3 * kPage, PROT_READ | PROT_WRITE, MAP_SHARED, memory);
		const Mapping second(3 * kPage, PROT_READ | PROT_WRITE, MAP_SHARED, memory);
		for (const auto &target : targets_) {
			judge_.refill(first.bytes());
			std::array<iovec, 4> parts;
			for (size_t i = 0; i < parts.size(); ++i)
				parts[i] = {(i % 2 ? first : second).bytes().data() + kPage, kPage};
			++reads_;
			const auto got = ::preadv(target.fd, parts.data(), parts.size(), 0);
			const auto size = target.expect(0, parts.size() * kPage).size();
			expect(target.path, 0, "bytes", static_cast<ssize_t>(size), got);
			for (const size_t at : {size_t{0}, 2 * kPage})
				expect_pattern("the neighbours of a page read twice", first.bytes(),
					       at, kPage);
			check(target, {target.name, 0, {{0, 4 * kPage}}});
			check_buffered(target, 0, 4 * kPage);
		}
		return {};
	}

	// Nor must pages that are listed once, though matches are copied from one listed twice.
	Result repeated_page()
	{
		constexpr size_t kPages = 64;
		const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
		const Fd memory(::memfd_create("page", MFD_CLOEXEC), "memfd");
		if (::ftruncate(memory, kPages * page))
			throw Error("memfd", 0, "ftruncate", errno_text(errno));
		const Mapping map(kPages * page, PROT_READ | PROT_WRITE, MAP_SHARED, memory);
		const auto bytes = map.bytes();
		if (::mmap(bytes.data() + page, page, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_FIXED, memory, 0) == MAP_FAILED)
			throw Error("memfd", 0, "its first page twice", errno_text(errno));
		const PathTrace trace;
		const auto before = reads_;
		for (const auto &target : targets_) {
			if (!target.compressed)
				continue;
			target.uncache();
			// as a whole, or windows are too small to be dropped behind
			const auto whole = std::min(target.size(), 4 * kMiB) / bytes.size();
			const auto rest = target.size() - whole * bytes.size();
			const auto start = whole ? (rest / page + 1) * page : 0;
			for (auto offset = start; offset < target.size(); offset += bytes.size()) {
				PathTrace::forget();
				const auto want = target.expect(offset, bytes.size());
				++reads_;
				expect(target.path, offset, "bytes",
				       static_cast<ssize_t>(want.size()),
				       ::pread(target.fd, bytes.data(), bytes.size(),
					       static_cast<off_t>(offset)));
				// whose second part is the one that is read last
				const auto first = want.size() > page ? page : 0;
				expect_bytes(target.path, offset + first, want.subspan(first),
					     bytes.subspan(first));
				const auto taken = PathTrace::taken();
				if (first && !taken.contains("overlap"))
					throw Error(target.path.string(),
						    static_cast<off_t>(offset), "overlap",
						    PathTrace::text(taken));
			}
			if (whole && !keeps_what_it_reads())
				expect_value(target, "cached pages after", 0,
					     cached_pages(target.fd));
		}
		return reads_ == before ? Result("no file of this image is compressed") : Result();
	}

	Result racing_writer()
	{
		constexpr int kReads = 12;
		const auto &target = biggest();
		const auto length = std::min(kMiB, target.aligned_size());
		for (size_t offset = 0; offset < std::min(target.size(), 4 * kMiB);
		     offset += kMiB) {
			{
				const std::jthread writer([this,
							   length](const std::stop_token &stop) {
					volatile std::byte *bytes = aligned();
					for (size_t i = 0; !stop.stop_requested(); i += 61)
						bytes[i % length] = static_cast<std::byte>(i);
				});
				const auto want = target.expect(offset, length).size();
				for (int i = 0; i < kReads; ++i)
					expect(target.path, offset, "bytes",
					       static_cast<ssize_t>(want),
					       ::pread(target.fd, aligned(), length,
						       static_cast<off_t>(offset)));
				reads_ += kReads;
			}
			refill(length);
			check(target, {target.name, offset, {{0, length}}});
			check_buffered(target, offset, length);
		}
		return {};
	}

	Result nothing_cached()
	{
		for (const auto &target : targets_) {
			expect_value(target, "cached pages before", 0, cached_pages(target.fd));
			for (size_t offset = 0; offset < target.size(); offset += kMiB)
				check_as_it_is(target, {target.name, offset, {{0, kMiB}}});
			check_as_it_is(target, {target.name, 0, {{0, target.block}}});
			expect_value(target, "cached pages after", 0, cached_pages(target.fd));
		}
		return {};
	}

	// What is served from the page cache has to be dropped behind.
	Result nothing_kept()
	{
		if (auto reason = keeps_what_it_reads())
			return reason;
		constexpr size_t kStep = 128 * 1024;
		const auto before = reads_;
		for (const auto &target : targets_) {
			if (!target.compressed)
				continue;
			target.uncache();
			const auto start = target.size() - std::min(target.size(), 4 * kMiB);
			for (auto offset = start; offset < target.size(); offset += kStep)
				check_as_it_is(target, {target.name, offset, {{1, kStep}}});
			expect_value(target, "cached pages after", 0, cached_pages(target.fd));
		}
		return reads_ == before ? Result("no file of this image is compressed") : Result();
	}

	// Decoders write transient bytes; what another filesystem may write back must be final.
	Result private_folios(const fs::path &directory)
	{
		const auto *target = compressed();
		if (!target)
			return "no file of this image has compressed data of its own";
		if (directory.empty())
			return "needs --private";
		const auto path = directory / "destination";
		constexpr size_t kLength = 512 * kPage;
		const Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600),
			    path.string());
		// written, not just mapped: its folios get their private data that way
		if (::pwrite(fd, pattern_.data(), kLength, 0) != static_cast<ssize_t>(kLength))
			throw Error(path.string(), 0, "a written file", errno_text(errno));
		const Mapping map(kLength, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		const auto bytes = map.bytes();
		const auto length = std::min(kLength - 2 * kPage, target->aligned_size());
		const auto want = target->expect(0, length);
		target->uncache();
		const PathTrace trace;
		const CachedOnce cached(*target);
		PathTrace::forget();
		++reads_;
		expect(target->path, 0, "bytes", static_cast<ssize_t>(want.size()),
		       ::pread(target->fd, bytes.data() + kPage, length, 0));
		if (!PathTrace::taken().contains("private"))
			throw Error(target->path.string(), 0, "private", "no such event");
		cached.check();
		expect_truth(*target, 0, bytes.data() + kPage, want.size());
		const auto end = kPage + want.size();
		expect_pattern(path, bytes, 0, kPage);
		expect_pattern(path, bytes, end, kLength - end);
		return {};
	}

	// One or two pages cannot be had: which ones, depends on how many come before. Or none that
	// follow each other.
	Result no_memory()
	{
		const auto *target = compressed();
		if (!target)
			return "no file of this image has compressed data of its own";
		if (!fs::exists(kFaults))
			return "the kernel has no fault injection";
		if (keeps_freed_memory())
			return "kmemleak gives up for good when it gets no memory";
		for (const auto &[name, value] : {std::pair{"probability", 100},
						  {"interval", 1},
						  {"verbose", 0},
						  {"ignore-gfp-wait", 0},
						  {"ignore-gfp-highmem", 0},
						  {"task-filter", 1}})
			std::ofstream(kFaults / name) << value;
		const Fd fail("/proc/self/make-it-fail", O_WRONLY);
		const PathTrace trace;
		PathTrace::forget();
		for (size_t i = 0; i < 30; ++i) {
			target->uncache();
			refill(kMiB);
			std::ofstream(kFaults / "space") << i / 3;
			std::ofstream(kFaults / "times") << (i % 3 == 2 ? 1000 : i % 3 + 1);
			std::ofstream(kFaults / "min-order") << (i % 3 == 2);
			const bool on = ::pwrite(fail, "1", 1, 0) == 1;
			const auto got = ::pread(target->fd, aligned(), kMiB, 0);
			const int code = errno;
			const bool off = ::pwrite(fail, "0", 1, 0) == 1;
			++reads_;
			if (!on || !off)
				throw Error("/proc/self/make-it-fail", 0, "a switch",
					    errno_text(errno));
			errno = code;
			expect(target->path, 0, "bytes",
			       static_cast<ssize_t>(std::min(kMiB, target->size())), got);
			expect_truth(*target, 0, aligned(), static_cast<size_t>(got));
		}
		if (!PathTrace::taken().contains("nomem"))
			throw Error(target->path.string(), 0, "nomem", "no such event");
		return {};
	}

	// Of an image with damaged data: an error, or what a buffered read returns; no stale bytes.
	Result damage()
	{
		// large requests have several windows and CPUs, asynchronous ones are a worker's
		for (const size_t step : {64 * size_t{1024}, kMiB, 3 * kMiB})
			for (const bool queued : {false, true}) {
				size_t errors = 0;
				if (queued && !Aio::available())
					return "the kernel has no AIO";
				for (const auto &target : targets_)
					errors += damage_of(target, step, queued);
				if (!errors)
					throw Error("the image", 0, "data that cannot be decoded",
						    "none");
			}
		return {};
	}

	// What is decoded for the next request must not make this one fail.
	Result sequential_damage()
	{
		constexpr size_t kStep = 64 * 1024, kAround = 4 * kStep;
		bool any = false;
		for (const auto &target : targets_) {
			// what is in the page cache is not decoded
			target.uncache();
			size_t done = 0;
			for (const auto bad : read_in_order(target, 0, target.size(), kStep)) {
				any = true;
				const auto begin = std::max(done, bad - std::min(bad, kAround));
				done = std::min(bad + kAround, target.size());
				read_in_order(target, begin, done, kPage);
			}
		}
		if (!any)
			throw Error("the image", 0, "data that cannot be decoded", "none");
		return {};
	}

	Result memory_returned()
	{
		if (keeps_freed_memory())
			return "kmemleak looks for leaks";
		const auto &target = biggest();
		const auto step = 16 * target.block;
		expect_no_leak([&] {
			constexpr size_t kReads = 1000;
			// what is kept for a reader has to go with his file
			for (size_t i = 0, at = 0; i < kReads / 8; ++i) {
				const Fd fd(target.path, O_RDONLY | O_DIRECT);
				for (size_t j = 0; j < 8; ++j, at += step)
					read_at(target, fd, at < target.size() ? at : at = 0, step);
			}
			return kReads;
		});
		return {};
	}

	void replay(const std::string &spec)
	{
		const auto call = parse_call(spec, arena_.bytes().size());
		const auto found = std::ranges::find(targets_, call.file, &Target::name);
		if (found == targets_.end())
			throw Error("--replay", 0, "a file of the image", call.file);
		check(*found, call);
	}

	void refill() { judge_.refill(arena_.bytes()); }

	size_t reads() const { return reads_; }

private:
	// How often a file cannot be read.
	size_t damage_of(const Target &target, size_t step, bool queued)
	{
		const Fd buffered(target.path, O_RDONLY);
		std::vector<std::byte> other(step);
		size_t errors = 0;
		for (size_t offset = 0; offset < target.size(); offset += step) {
			const auto whole = target.expect(offset, step).size();
			// what is in the page cache is not decoded
			target.uncache();
			refill(step);
			++reads_;
			const auto got = read_or_error(target, offset, step, queued);
			size_t want = 0;
			for (ssize_t more = 1; more > 0 && want < whole;
			     want += static_cast<size_t>(std::max<ssize_t>(more, 0)))
				more = ::pread(buffered, other.data() + want, whole - want,
					       static_cast<off_t>(offset + want));
			if (got < 0) {
				++errors;
				if (got != -EIO || want == whole)
					throw Error(target.path.string(),
						    static_cast<off_t>(offset),
						    want == whole ? "data" : "EIO",
						    errno_text(static_cast<int>(-got)));
				continue;
			}
			expect_value(target, "bytes read", whole, static_cast<size_t>(got));
			expect_bytes(target.path, offset, std::span(other).first(want),
				     {aligned(), step});
			for (size_t i = 0; i + 512 <= whole; i += 512)
				if (!std::memcmp(aligned() + i, pattern_.data() + kGuard + i, 512))
					throw Error(target.path.string(),
						    static_cast<off_t>(offset + i),
						    "data or an error", "stale bytes");
		}
		return errors;
	}

	ssize_t read_or_error(const Target &target, size_t offset, size_t length, bool queued)
	{
		if (!queued) {
			const auto got =
				::pread(target.fd, aligned(), length, static_cast<off_t>(offset));
			return got < 0 ? -errno : got;
		}
		Aio queue(1);
		const iovec part{aligned(), length};
		queue.submit({0, target.fd, offset, {&part, 1}});
		return queue.wait().result;
	}

	// Why what is read through the page cache stays there.
	static Result keeps_what_it_reads()
	{
		struct utsname system;
		int major = 0, minor = 0;
		if (::uname(&system) || std::sscanf(system.release, "%d.%d", &major, &minor) != 2)
			throw Error("uname", 0, "a release", system.release);
		if (std::pair(major, minor) < std::pair(6, 14))
			return "Linux " + std::string(system.release) + " has no drop-behind";
		return {};
	}

	static std::vector<Target> open_all(const fs::path &mount, const fs::path &truth)
	{
		std::vector<Target> targets;
		for (const auto &name : regular_files(truth))
			targets.push_back(open_target(mount, name, slurp(truth / name)));
		return targets;
	}

	// Where aligned() points to has been written to, so many bytes.
	void refill(size_t length)
	{
		// the guard in front may show that something else has been, too
		std::copy_n(pattern_.begin() + kGuard, length, aligned());
	}
	std::byte *aligned() const { return arena_.bytes().data() + kGuard; }
	size_t pick(size_t below)
	{
		return std::uniform_int_distribution<size_t>(0, below - 1)(rng_);
	}

	const Target &biggest() const
	{
		return *std::ranges::max_element(targets_, {}, &Target::size);
	}

	[[noreturn]] static void fail(const Call &call, const Error &error)
	{
		throw std::runtime_error(std::string(error.what()) + "; dio_read --replay '" +
					 call.spec() + "'");
	}

	static void expect_value(const Target &target, std::string_view what, size_t expected,
				 size_t got)
	{
		if (got != expected)
			throw Error(target.path.string(), 0,
				    std::string(what) + " " + std::to_string(expected),
				    std::to_string(static_cast<ssize_t>(got)));
	}

	static void expect_truth(const Target &target, size_t offset, const std::byte *bytes,
				 size_t count)
	{
		const auto want = target.expect(offset, count);
		expect(target.path, offset, "bytes", static_cast<ssize_t>(want.size()),
		       static_cast<ssize_t>(count));
		expect_bytes(target.path, offset, want, {bytes, count});
	}

	void expect_pattern(const fs::path &what, std::span<const std::byte> bytes, size_t at,
			    size_t length) const
	{
		expect_bytes(what, at, std::span(pattern_).subspan(at, length),
			     bytes.subspan(at, length));
	}

	size_t read_at(const Target &target, int fd, size_t offset, size_t length)
	{
		++reads_;
		const auto got = ::pread(fd, aligned(), length, static_cast<off_t>(offset));
		expect(target.path, offset, "bytes",
		       static_cast<ssize_t>(target.expect(offset, length).size()), got);
		expect_truth(target, offset, aligned(), static_cast<size_t>(got));
		return static_cast<size_t>(got);
	}

	// Each request as if it was the first one of its file; returns where they fail.
	std::vector<size_t> read_in_order(const Target &target, size_t begin, size_t end,
					  size_t step)
	{
		const Fd fd(target.path, O_RDONLY | O_DIRECT);
		std::byte *const alone = aligned() + step;
		std::vector<size_t> failed;
		for (auto offset = begin; offset < end; offset += step) {
			const auto at = static_cast<off_t>(offset);
			const Fd other(target.path, O_RDONLY | O_DIRECT);
			const auto want = answer(::pread(other, alone, step, at));
			const auto got = answer(::pread(fd, aligned(), step, at));
			const auto what =
				target.path.string() + ", in order by " + std::to_string(step);
			reads_ += 2;
			if (got != want)
				throw Error(what, at, text(want), text(got));
			// those of a single read
			if (got > 0)
				expect_bytes(what, offset, {alone, static_cast<size_t>(got)},
					     {aligned(), static_cast<size_t>(got)});
			if (got < 0)
				failed.push_back(offset);
		}
		return failed;
	}

	static ssize_t answer(ssize_t got) { return got < 0 ? -errno : got; }
	static std::string text(ssize_t answer)
	{
		return answer < 0 ? errno_text(static_cast<int>(-answer))
				  : std::to_string(answer) + " bytes";
	}

	static void check_buffered(const Target &target, size_t offset, size_t length)
	{
		const Fd fd(target.path, O_RDONLY);
		std::vector<std::byte> bytes(target.expect(offset, length).size());
		const auto got =
			::pread(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
		expect(target.path, offset, "buffered bytes", static_cast<ssize_t>(bytes.size()),
		       got);
		expect_truth(target, offset, bytes.data(), bytes.size());
	}

	void expect_fault(const Target &target, std::span<std::byte> memory)
	{
		++reads_;
		const auto got = ::pread(target.fd, memory.data(), memory.size(), 0);
		if (got >= 0 || errno != EFAULT)
			throw Error(target.path.string(), 0,
				    "EFAULT into memory that is not writable",
				    got < 0 ? errno_text(errno) : std::to_string(got) + " bytes");
	}

	// The buffer becomes invalid after `writable` bytes: fewer bytes, or an error, never wrong
	// ones.
	void expect_prefix(const Target &target, size_t writable, size_t missing)
	{
		const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
		const auto rounded = (writable + page - 1) / page * page;
		const Mapping memory(page + rounded + missing);
		const auto bytes = memory.bytes();
		if (::mprotect(bytes.data() + page + rounded, missing, PROT_NONE))
			throw Error("memory", 0, "mprotect", errno_text(errno));
		judge_.refill(bytes.first(page));
		++reads_;
		const auto start = rounded - writable / target.block * target.block;
		const auto got = ::pread(target.fd, bytes.data() + page + start,
					 rounded - start + missing, 0);
		if (got < 0 ? errno != EFAULT : !got || got > static_cast<ssize_t>(rounded - start))
			throw Error(target.path.string(), 0,
				    "EFAULT or up to " + std::to_string(rounded - start) + " bytes",
				    got < 0 ? errno_text(errno) : std::to_string(got));
		if (got > 0)
			expect_truth(target, 0, bytes.data() + page + start,
				     static_cast<size_t>(got));
		expect_pattern("before the buffer", bytes, 0, page);
	}

	void expect_path(const Target &target, size_t offset, const std::vector<Segment> &segments,
			 const std::string &path)
	{
		const Call call{target.name, offset, segments};
		PathTrace::forget();
		check(target, call);
		const auto taken = PathTrace::taken();
		if (taken != std::set{path})
			fail(call, Error(target.path.string(), static_cast<off_t>(offset), path,
					 PathTrace::text(taken)));
	}

	const Target *compressed() const
	{
		const Target *found = nullptr;
		for (const auto &target : targets_)
			if (target.compressed && !target.packed &&
			    (!found || target.size() > found->size()))
				found = &target;
		return found;
	}

	static std::set<size_t> offsets(const Target &target)
	{
		const auto block = target.block;
		const auto last = target.aligned_size();
		std::set<size_t> all{0,
				     block,
				     3 * block,
				     5 * block,
				     target.size() / 2 / block * block,
				     last - std::min(last, block),
				     last - std::min(last, 2 * block),
				     last,
				     1,
				     512,
				     1152,
				     target.size() - std::min<size_t>(target.size(), 1),
				     target.size()};
		for (const size_t cluster : {16384ul, 65536ul, kMiB}) {
			for (const auto near : {cluster - block, cluster + 512})
				all.insert(near);
		}
		std::erase_if(all, [last](size_t offset) { return offset > last; });
		return all;
	}

	static std::set<size_t> lengths(const Target &target, size_t offset)
	{
		const auto block = target.block;
		std::set<size_t> all{512, block, 3 * block, 1000, 65536, kMiB + block};
		const auto rest = target.aligned_size() - std::min(target.aligned_size(), offset);
		std::erase_if(all, [rest](size_t length) { return length > rest + 65536; });
		// The largest ones at a few places only: they cost as much as all others together.
		if ((!offset || offset == 1152) && target.size() > kMiB)
			all.insert(8 * kMiB);
		if (!offset)
			all.insert(target.size());
		if (offset == block)
			all.insert(target.aligned_size());
		return all;
	}

	static std::set<std::pair<size_t, size_t>> ranges(const Target &target)
	{
		const auto block = target.block;
		const auto last = target.aligned_size();
		std::set<std::pair<size_t, size_t>> all{
			{0, 2 * block},
			{block, 16 * kPage},
			{65536 - block, 5 * kPage},
			{7 * block, 300 * kPage},
			{last - std::min(last, 3 * block), 4 * kPage}};
		std::erase_if(all, [last](const auto &range) { return range.first > last; });
		return all;
	}

	static std::vector<std::vector<Segment>> layouts(size_t length)
	{
		const auto half = length / 2 / 512 * 512;
		const auto rest = length - half;
		std::vector<std::vector<Segment>> all{
			{{0, half}, {half + 2 * kPage, rest}},
			{{512, half}, {half + 2 * kPage + 1536, rest}},
			{{half + 2 * kPage, rest}, {0, half}},
			{{0, half}, {half, rest}},
			{{kPage - 512, 512}, {2 * kPage, 0}, {3 * kPage, length - 512}},
			{{64, half}, {half + kPage + 4, rest}},
			{{3, 100}, {1000, 28}, {2 * kPage + 1, length - 128}}};
		std::vector<Segment> small;
		for (size_t i = 0; i < std::min<size_t>(length / 512, 900); ++i)
			small.push_back({i * 1536, 512});
		all.push_back(std::move(small));
		return all;
	}

	std::vector<Target> targets_;
	std::mt19937_64 rng_;
	Mapping arena_;
	std::vector<std::byte> pattern_;
	Judge judge_;
	size_t reads_ = 0;
};

bool run_all(Tester &tester, const std::string &name, uint64_t seed, const fs::path &directory,
	     bool damaged)
{
	std::vector<std::pair<std::string_view, std::function<Result()>>> groups{
		// first, since buffered reads may leave readahead in flight
		{"nothing_cached", [&] { return tester.nothing_cached(); }},
		{"nothing_kept", [&] { return tester.nothing_kept(); }},
		{"every_offset", [&] { return tester.every_offset(); }},
		{"memory_alignment", [&] { return tester.memory_alignment(); }},
		{"segments", [&] { return tester.segments(); }},
		{"overlapping_segments", [&] { return tester.overlapping_segments(); }},
		{"end_of_file", [&] { return tester.end_of_file(); }},
		{"paths_taken", [&] { return tester.paths_taken(); }},
		{"whole_files_in_order", [&] { return tester.whole_files_in_order(); }},
		{"sequential_reads", [&] { return tester.sequential_reads(); }},
		{"cached_data", [&] { return tester.cached_data(); }},
		{"empty_reads", [&] { return tester.empty_reads(); }},
		{"bad_addresses", [&] { return tester.bad_addresses(); }},
		{"same_page_twice", [&] { return tester.same_page_twice(); }},
		{"repeated_page", [&] { return tester.repeated_page(); }},
		{"racing_writer", [&] { return tester.racing_writer(); }},
		{"private_folios", [&] { return tester.private_folios(directory); }},
		{"no_memory", [&] { return tester.no_memory(); }},
		{"memory_returned", [&] { return tester.memory_returned(); }},
		{"pins_released", pins_released},
	};
	if (damaged)
		groups = {{"damage", [&] { return tester.damage(); }},
			  {"sequential_damage", [&] { return tester.sequential_damage(); }},
			  groups.back()};
	std::vector<ktap::Case> cases;
	for (const auto &[group, body] : groups)
		cases.push_back({group, [&tester, body] {
					 // what failed before may have left anything in it
					 tester.refill();
					 const auto before = tester.reads();
					 auto reason = body();
					 ktap::line("    # " +
						    std::to_string(tester.reads() - before) +
						    " reads");
					 return reason;
				 }});
	ktap::line("# seed " + std::to_string(seed));
	return ktap::run(name, cases);
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Direct reads of a mounted EROFS image against the files it was made from"};
	std::string mount, truth, name = "dio_read", spec, directory;
	uint64_t seed = 1;
	bool damaged = false;
	app.add_option("--mount", mount, "where the image is mounted")->required();
	app.add_option("--truth", truth, "directory with the same files")->required();
	app.add_flag("--damaged", damaged, "the image has been damaged: reads may fail");
	app.add_option("--private", directory,
		       "a directory of a filesystem that keeps private data in folios");
	app.add_option("--name", name, "name of the suite in the KTAP output");
	app.add_option("--seed", seed, "seed of all that is random");
	app.add_option("--replay", spec, "make this one call only: FILE,OFFSET,AT+LEN[,AT+LEN]...");
	CLI11_PARSE(app, argc, argv);
	try {
		Tester tester(mount, truth, seed);
		if (spec.empty())
			return run_all(tester, name, seed, directory, damaged) ? 0 : 1;
		const ktap::Case replay{"replay", [&] {
						tester.replay(spec);
						return Result();
					}};
		return ktap::run(name, {replay}) ? 0 : 1;
	} catch (const std::exception &error) {
		ktap::line(std::string("Bail out! ") + error.what());
		return 1;
	}
}
