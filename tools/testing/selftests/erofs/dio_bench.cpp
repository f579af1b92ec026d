// SPDX-License-Identifier: GPL-2.0-only
// Measures the cells of a plan: one way to read, one file system, one request size each. The
// columns of a cell take turns, in another order each round, so that what drifts with time meets
// all of them.

#include <algorithm>
#include <array>
#include <barrier>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <deque>
#include <fstream>
#include <iostream>
#include <list>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <thread>

#include <CLI/CLI.hpp>
#include <liburing.h>
#include <nlohmann/json.hpp>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <xxhash.h>

#include "block.hpp"
#include "io.hpp"
#include "memory.hpp"
#include "trace.hpp"

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;
using Bytes = std::span<std::byte>;

#ifdef KERNEL_LZ4
extern "C" int LZ4_decompress_safe(const char *source, char *dest, int compressed, int capacity);
extern "C" int LZ4_decompress_safe_partial(const char *source, char *dest, int compressed,
					   int target, int capacity);
#endif
#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x80
#endif

namespace
{

constexpr size_t huge_page = 2 << 20;
// of the middle of a file: several times what is kept and read ahead for its reader
constexpr size_t staged = 4 << 20;

enum class Mode { buffered, dropbehind, direct, floor };

NLOHMANN_JSON_SERIALIZE_ENUM(Mode, {{Mode::buffered, "buffered"},
				    {Mode::dropbehind, "dropbehind"},
				    {Mode::direct, "direct"},
				    {Mode::floor, "floor"}})

struct Column {
	std::string name, device, filesystem;
	Mode mode;
	bool huge;
	// KiB; zero: what the device has
	unsigned long read_ahead;
	std::vector<std::string> files;
	// of the floor: how each of the files is stored, as erofs_oracle lists it
	std::vector<std::string> extents;
};

void from_json(const Json &item, Column &column)
{
	column = {item.at("name"),
		  item.at("device"),
		  item.value("filesystem", "erofs"),
		  item.at("mode"),
		  item.value("huge", false),
		  item.value("read_ahead", 0ul),
		  item.value("files", std::vector<std::string>()),
		  item.value("extents", std::vector<std::string>())};
}

struct Cell {
	// names the cell in the report; what is not said otherwise below is only passed on
	Json parameters;
	bool random;
	// zero depth: synchronous; times: mounts of a pass; bytes: of each thread and mount
	unsigned threads, depth, times;
	size_t request, bytes;
	std::vector<Column> columns;
};

void from_json(const Json &item, Cell &cell)
{
	const auto &given = item.at("parameters");
	cell = {given,
		given.at("pattern") == "random",
		given.at("threads"),
		given.at("depth"),
		item.value("times", 1u),
		given.at("request"),
		item.at("bytes"),
		item.at("columns")};
	if (!cell.threads || !cell.request || cell.bytes < cell.request)
		throw Error("plan", 0, "threads, a request and no fewer bytes than that",
			    item.dump());
}

void report(const Json &row)
{
	std::cout << "@json " + row.dump() + "\n" << std::flush;
}

// Where the emulator begins and ends to count; nothing at all on other machines.
template <unsigned id> void mark()
{
#ifdef __aarch64__
	asm volatile("movz xzr, #%c0" ::"i"(0xe200 | id) : "memory");
#endif
}

// Who is to end puts back first what he has set.
volatile std::sig_atomic_t stopped;

size_t huge_bytes()
{
	std::ifstream in("/proc/self/smaps_rollup");
	for (std::string line; std::getline(in, line);)
		if (line.starts_with("AnonHugePages:"))
			return std::stoul(line.substr(line.find_first_of("0123456789"))) << 10;
	return 0;
}

// Which the machine has not, or not as many of them.
class NoHugePages : public Error
{
	using Error::Error;
};

// Memory in huge pages, or in none at all; touched, because page faults are not what is measured.
class Buffer
{
public:
	Buffer(size_t size, bool huge)
	    : map_((size + 2 * huge_page - 1) & ~(huge_page - 1)), bytes_(aligned(size))
	{
		const size_t whole = (size + huge_page - 1) & ~(huge_page - 1);
		// a kernel without huge pages knows neither
		if (::madvise(bytes_.data(), whole, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) &&
		    (huge || errno != EINVAL))
			throw NoHugePages("madvise", 0, "success", errno_text(errno));
		const size_t before = huge ? huge_bytes() : 0;
		std::ranges::fill(Bytes(bytes_.data(), huge ? whole : size), std::byte{1});
		if (huge && huge_bytes() < before + whole)
			throw NoHugePages("madvise", 0,
					  std::to_string(whole) + " bytes in huge pages",
					  std::to_string(huge_bytes() - before));
	}

	Bytes part(size_t offset, size_t size) const { return bytes_.subspan(offset, size); }

private:
	Bytes aligned(size_t size) const
	{
		void *at = map_.bytes().data();
		size_t space = map_.bytes().size();
		std::align(huge_page, size, at, space);
		return {static_cast<std::byte *>(at), size};
	}

	Mapping map_;
	Bytes bytes_;
};

// Of what each request has read, in whatever order they end; of one, it is added in order.
class Hash
{
public:
	explicit Hash(size_t request) : request_(request) {}

	void add(size_t at, std::span<const std::byte> data)
	{
		while (!data.empty()) {
			const auto part =
				data.first(std::min(data.size(), request_ - at % request_));
			if (at % request_ == 0)
				XXH3_64bits_reset(state_.get());
			XXH3_64bits_update(state_.get(), part.data(), part.size());
			data = data.subspan(part.size());
			at += part.size();
			if (at % request_ == 0)
				requests_[at - request_] = XXH3_64bits_digest(state_.get());
		}
	}

	uint64_t value() const
	{
		std::vector<uint64_t> all;
		for (const auto &[at, hash] : requests_)
			all.insert(all.end(), {at, hash});
		return XXH3_64bits(all.data(), all.size() * sizeof(all[0]));
	}

private:
	size_t request_;
	std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_{XXH3_createState(),
									XXH3_freeState};
	std::map<size_t, uint64_t> requests_;
};

// How far buffered reads of a device are ahead of their readers.
class ReadAhead
{
public:
	ReadAhead(const std::string &device, unsigned long kib) : device_(device, O_RDONLY)
	{
		if (::ioctl(device_, BLKRAGET, &before_) ||
		    (kib && ::ioctl(device_, BLKRASET, kib * 2)))
			throw Error(device, 0, "to have its read-ahead set", errno_text(errno));
	}
	ReadAhead(const ReadAhead &) = delete;
	ReadAhead &operator=(const ReadAhead &) = delete;
	~ReadAhead() { ::ioctl(device_, BLKRASET, before_); }

private:
	Fd device_;
	unsigned long before_ = 0;
};

// An open file, and how it is read.
class Source
{
public:
	Source(const fs::path &path, Mode mode)
	    : path_(path), mode_(mode), fd_(path, O_RDONLY | (mode == Mode::direct ? O_DIRECT : 0)),
	      size_(file_size(fd_))
	{
		// a kernel that does not offer it says so at once, at the end of the file, too
		std::byte byte;
		const iovec to{&byte, 1};
		uncached_ = mode == Mode::dropbehind &&
			    ::preadv2(fd_, &to, 1, static_cast<off_t>(size_), RWF_DONTCACHE) >= 0;
	}

	const fs::path &path() const { return path_; }
	int fd() const { return fd_; }
	size_t size() const { return size_; }
	bool uncached() const { return uncached_; }
	int flags() const { return uncached_ ? RWF_DONTCACHE : 0; }

	void read(Bytes to, size_t offset) const
	{
		const iovec part{to.data(), to.size()};
		const auto got =
			uncached_ ? ::preadv2(fd_, &part, 1, static_cast<off_t>(offset),
					      RWF_DONTCACHE)
				  : ::pread(fd_, to.data(), to.size(), static_cast<off_t>(offset));
		check(got < 0 ? -errno : got, to.size(), offset);
	}

	// What a read returned, or an error as a negative number.
	void check(ssize_t got, size_t wanted, size_t offset) const
	{
		if (got < 0 || static_cast<size_t>(got) != std::min(wanted, size_ - offset))
			throw Error(path_.string(), static_cast<off_t>(offset),
				    std::to_string(wanted) + " bytes",
				    got < 0 ? errno_text(static_cast<int>(-got))
					    : std::to_string(got));
		if (mode_ == Mode::dropbehind && !uncached_)
			::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(wanted),
					POSIX_FADV_DONTNEED);
	}

private:
	fs::path path_;
	Mode mode_;
	Fd fd_;
	size_t size_;
	bool uncached_ = false;
};

// What one thread reads, and how long each request took.
struct Work {
	std::vector<size_t> offsets;
	std::vector<Clock::duration> latencies;
	// in the round that is not measured
	std::optional<Hash> hash;

	void use(size_t at, Bytes data)
	{
		if (hash)
			hash->add(at, data);
	}
};

void read_in_turn(const Source &source, const Buffer &buffer, size_t request, Work &work)
{
	for (const auto offset : work.offsets) {
		const auto start = Clock::now();
		source.read(buffer.part(0, request), offset);
		work.latencies.push_back(Clock::now() - start);
		work.use(offset, buffer.part(0, request));
	}
}

// The clock of a request would be counted, too.
void read_uncounted(const Source &source, const Buffer &buffer, size_t request, Work &work)
{
	for (const auto offset : work.offsets) {
		source.read(buffer.part(0, request), offset);
		work.use(offset, buffer.part(0, request));
	}
}

class Ring
{
public:
	explicit Ring(unsigned depth)
	{
		if (const int error = io_uring_queue_init(depth, &ring_, 0))
			throw Error("io_uring_setup", 0, "success", errno_text(-error));
	}
	Ring(const Ring &) = delete;
	Ring &operator=(const Ring &) = delete;
	~Ring() { io_uring_queue_exit(&ring_); }

	void submit(const Source &source, Bytes to, size_t offset, uint64_t slot)
	{
		auto *const entry = io_uring_get_sqe(&ring_);
		io_uring_prep_read(entry, source.fd(), to.data(), static_cast<unsigned>(to.size()),
				   offset);
		entry->rw_flags = source.flags();
		io_uring_sqe_set_data64(entry, slot);
		if (const int done = io_uring_submit(&ring_); done != 1)
			throw Error(source.path().string(), static_cast<off_t>(offset),
				    "one request submitted", std::to_string(done));
	}

	std::pair<uint64_t, int> wait()
	{
		io_uring_cqe *entry;
		if (const int error = io_uring_wait_cqe(&ring_, &entry))
			throw Error("io_uring_wait_cqe", 0, "success", errno_text(-error));
		const std::pair result(io_uring_cqe_get_data64(entry), entry->res);
		io_uring_cqe_seen(&ring_, entry);
		return result;
	}

private:
	io_uring ring_;
};

void read_queued(const Source &source, const Buffer &buffer, size_t request, unsigned depth,
		 Work &work)
{
	struct Slot {
		size_t offset;
		Clock::time_point start;
	};
	std::vector<Slot> slots(depth);
	Ring ring(depth);
	auto next = work.offsets.begin();
	unsigned flying = 0;
	const auto submit = [&](uint64_t slot) {
		if (next == work.offsets.end())
			return;
		slots[slot] = {*next++, Clock::now()};
		ring.submit(source, buffer.part(slot * request, request), slots[slot].offset, slot);
		++flying;
	};
	for (uint64_t slot = 0; slot < depth; ++slot)
		submit(slot);
	while (flying) {
		const auto [slot, result] = ring.wait();
		work.latencies.push_back(Clock::now() - slots[slot].start);
		--flying;
		source.check(result, request, slots[slot].offset);
		work.use(slots[slot].offset, buffer.part(slot * request, request));
		submit(slot);
	}
}

// The extents of a file, in memory: what remains to be done is what its decoder does.
class Floor
{
public:
	Floor(const fs::path &list, const std::string &device, size_t bytes)
	{
		const Fd fd(device, O_RDONLY);
		std::ifstream in(list);
		std::string line, how;
		std::getline(in, line); // titles
		for (Extent extent; std::getline(in, line);) {
			std::istringstream words(line);
			uint64_t from;
			if (!(words >> extent.at >> extent.length >> from >> extent.stored >> how))
				throw Error(list.string(), 0, "an extent", line);
			if (extent.at >= bytes)
				break;
			extent.plain = how == "shifted" || how == "interlaced";
			extent.partial = line.ends_with("partial");
			if (!extent.plain && how != "lz4")
				throw Error(list.string(), 0, "lz4 or what is stored plain", line);
			extent.data = input_.size();
			largest_ = std::max(largest_, extent.length);
			input_.resize(input_.size() + extent.stored);
			load(fd, device, from, Bytes(input_).last(extent.stored));
			// data ends where its blocks end
			while (!extent.plain && extent.stored &&
			       input_[extent.data] == std::byte{0}) {
				++extent.data;
				--extent.stored;
			}
			extents_.push_back(extent);
		}
		if (extents_.empty())
			throw Error(list.string(), 0, "extents", "none");
	}

	size_t largest() const { return largest_; }

	// Into the buffer at the offset in a page that the file has; use() sees each extent.
	template <typename Use> void decode(Bytes to, Use use) const
	{
		for (const auto &extent : extents_) {
			const auto out = to.subspan(extent.at % page, extent.length);
			decode(extent, out);
			use(extent.at, out);
		}
	}

	static constexpr size_t page = 4096;

private:
	struct Extent {
		size_t at, length, data, stored;
		bool plain, partial;
	};

	static void load(int fd, const std::string &device, size_t from, Bytes to)
	{
		if (::pread(fd, to.data(), to.size(), static_cast<off_t>(from)) !=
		    static_cast<ssize_t>(to.size()))
			throw Error(device, static_cast<off_t>(from),
				    std::to_string(to.size()) + " bytes", errno_text(errno));
	}

	void decode(const Extent &extent, Bytes out) const
	{
		const auto in = std::span(input_).subspan(extent.data, extent.stored);
		if (extent.plain) {
			std::memcpy(out.data(), in.data(), std::min(in.size(), out.size()));
			return;
		}
#ifdef KERNEL_LZ4
		const auto *const from = reinterpret_cast<const char *>(in.data());
		auto *const dest = reinterpret_cast<char *>(out.data());
		const auto have = static_cast<int>(in.size()), want = static_cast<int>(out.size());
		const int got = extent.partial
					? LZ4_decompress_safe_partial(from, dest, have, want, want)
					: LZ4_decompress_safe(from, dest, have, want);
		if (got == want)
			return;
#endif
		throw Error("floor", static_cast<off_t>(extent.at), "data of this length", "none");
	}

	std::vector<std::byte> input_;
	std::vector<Extent> extents_;
	size_t largest_ = 0;
};

size_t device_bytes(const std::string &device)
{
	struct stat info;
	if (::stat(device.c_str(), &info))
		throw Error(device, 0, "stat", errno_text(errno));
	return bytes_read(device_number(info.st_rdev));
}

// All pages that anybody allocates or frees meanwhile. What is freed without having been seen
// before counts from the start, so that the peak is never too low.
class PageTrace
{
public:
	PageTrace() { EventTrace::forget(); }

	static bool offered() { return EventTrace::available(kTaken); }

	// Nothing if some of them have been lost.
	std::optional<int64_t> peak()
	{
		events_.clear();
		if (EventTrace::lost())
			return {};
		int64_t held = 0, highest = 0, before = 0;
		std::map<uint64_t, int64_t> seen;
		for (const auto &line : EventTrace::lines(" mm_page_")) {
			const bool taken = line.find(" mm_page_alloc: ") != line.npos;
			const auto page = EventTrace::number(line, " pfn=");
			const auto size = int64_t{::sysconf(_SC_PAGESIZE)}
					  << EventTrace::number(line, " order=");
			if (taken)
				seen[page] = size;
			else if (!seen.erase(page))
				before += size;
			else
				held -= size;
			held += taken ? size : 0;
			highest = std::max(highest, held);
		}
		return highest + before;
	}

private:
	static constexpr std::string_view kTaken = "kmem/mm_page_alloc",
					  kFreed = "kmem/mm_page_free";

	Setting room_{EventTrace::top() / "buffer_size_kb", "16384"};
	std::list<EventTrace> events_ = begin();

	static std::list<EventTrace> begin()
	{
		std::list<EventTrace> events;
		for (const auto event : {kTaken, kFreed})
			events.emplace_back(event);
		return events;
	}
};

double seconds(Clock::duration time)
{
	return std::chrono::duration<double>(time).count();
}

// By nearest rank; a hundredth of fewer than a hundred is not one of them.
Json quantiles(std::vector<Clock::duration> times)
{
	std::ranges::sort(times);
	Json row = Json::object();
	for (const auto &[name, percent, least] :
	     {std::tuple("p50", 50, 1), std::tuple("p99", 99, 100)})
		if (times.size() >= static_cast<size_t>(least))
			row[name] = seconds(times[(times.size() * percent + 99) / 100 - 1]);
	return row;
}

class Bench
{
public:
	Bench(fs::path mount, bool count) : mount_(std::move(mount)), count_(count) {}

	void run(const Cell &cell, unsigned rounds)
	{
		first_.clear();
		// the first pass meets cold allocators and is left out
		for (unsigned round = 0; round <= rounds; ++round)
			for (const auto i : shuffled(cell.columns.size()))
				attempt(cell.columns[i],
					[&] { pass(cell, cell.columns[i], round); });
		if (count_ || cell.random || cell.threads > 1 || cell.depth ||
		    !PageTrace::offered())
			return;
		for (const auto &column : cell.columns)
			if (column.mode == Mode::direct)
				attempt(column, [&] { stage(cell, column); });
	}

private:
	// Huge pages may run out at any time, which is no reason to lose what can be measured.
	template <typename Do> void attempt(const Column &column, Do measure)
	{
		if (stopped)
			throw Error("dio_bench", 0, "to measure all of it", "a signal");
		try {
			measure();
		} catch (const NoHugePages &) {
			report({{"note", column.name + " is not measured where huge pages lack"}});
		}
	}

	// No column always comes behind the same other one, whose traces it would meet.
	std::vector<size_t> shuffled(size_t count)
	{
		std::vector<size_t> order(count);
		std::iota(order.begin(), order.end(), 0);
		std::ranges::shuffle(order, random_);
		return order;
	}

	void pass(const Cell &cell, const Column &column, unsigned round)
	{
		std::vector<Work> works(cell.threads);
		std::optional<PathTrace> others;
		if (!round) {
			for (auto &work : works)
				work.hash.emplace(cell.request);
		}
		// one that is not measured tells of the others, unless memory comes and goes
		if ((!round || cell.parameters.value("memory", "") == "low") &&
		    column.mode == Mode::direct && PathTrace::offered()) {
			others.emplace("path != 0");
			PathTrace::forget();
		}
		auto row = column.mode == Mode::floor ? pass_floor(cell, column, works)
						      : pass_file(cell, column, works);
		if (!round)
			verify(column, works);
		if (const auto count = others ? PathTrace::all().size() : 0)
			report({{"note", cell.parameters.dump() + ", " + column.name + ": " +
						 std::to_string(count) +
						 " reads were not direct (" +
						 PathTrace::text(PathTrace::taken()) + ")"}});
		row.update({{"cell", cell.parameters},
			    {"column", column.name},
			    {"round", round},
			    {"bytes", bytes_of(cell, column) * cell.threads * cell.times}});
		if (round || count_)
			report(row);
	}

	// Files are read in whole requests.
	static size_t bytes_of(const Cell &cell, const Column &column)
	{
		return column.mode == Mode::floor ? cell.bytes
						  : cell.bytes / cell.request * cell.request;
	}

	// All columns of a cell read the same.
	void verify(const Column &column, const std::vector<Work> &works)
	{
		for (size_t i = 0; i < works.size(); ++i) {
			const auto got = works[i].hash->value();
			if (first_.size() == i)
				first_.push_back(got);
			if (first_[i] != got)
				throw Error(column.name + ": " +
						    column.files[i % column.files.size()],
					    0, "data of hash " + std::to_string(first_[i]),
					    std::to_string(got));
		}
	}

	// What a sequential reader takes beside its destination, with what is kept and read ahead
	// for its next request; one before it has read the meta data.
	void stage(const Cell &cell, const Column &column) const
	{
		const Mount mount(column.device, mount_, {}, column.filesystem);
		const auto path = mount_ / column.files.at(0);
		const Buffer buffer(cell.request, column.huge);
		const auto read = [&](const Source &source) {
			const auto whole = source.size() / cell.request;
			const auto some = std::max(staged / cell.request, size_t{2});
			for (auto i = whole / 2; i < std::min(whole, whole / 2 + some); ++i)
				source.read(buffer.part(0, cell.request), i * cell.request);
		};
		read(Source(path, column.mode));
		PageTrace trace;
		// closed at once: what has been allocated in bulk is seen when it is freed
		read(Source(path, column.mode));
		const auto peak = trace.peak();
		if (!peak) {
			report({{"note", cell.parameters.dump() + ", " + column.name +
						 ": staging is not known, events were lost"}});
			return;
		}
		report({{"cell", cell.parameters},
			{"column", column.name},
			{"round", 0},
			{"bytes", cell.request},
			{"staging", *peak}});
	}

	Json pass_floor(const Cell &cell, const Column &column, std::vector<Work> &works) const
	{
		std::vector<Floor> floors;
		std::deque<Buffer> buffers;
		for (unsigned i = 0; i < cell.threads; ++i) {
			floors.emplace_back(column.extents.at(i % column.extents.size()),
					    column.device, cell.bytes);
			buffers.emplace_back(floors.back().largest() + Floor::page, column.huge);
		}
		const auto time = timed(cell.threads, [&](unsigned i) {
			floors[i].decode(buffers[i].part(0, floors[i].largest() + Floor::page),
					 [&](size_t at, Bytes data) {
						 works[i].use(
							 at, data.first(std::min(data.size(),
										 cell.bytes - at)));
					 });
		});
		return {{"seconds", seconds(time)}};
	}

	Json pass_file(const Cell &cell, const Column &column, std::vector<Work> &works) const
	{
		const ReadAhead ahead(column.device, column.read_ahead);
		std::deque<Buffer> buffers;
		for (unsigned i = 0; i < cell.threads; ++i)
			buffers.emplace_back(cell.request * std::max(1u, cell.depth), column.huge);
		Reading all;
		for (unsigned i = 0; i < cell.times; ++i)
			read(cell, column, i, buffers, works, all);
		Json row = quantiles(all_latencies(works));
		row.update({{"seconds", seconds(all.time)},
			    {"pages", all.pages},
			    {"device_bytes", all.device_bytes}});
		if (column.mode == Mode::dropbehind)
			row["dropped"] = all.uncached ? "RWF_DONTCACHE" : "posix_fadvise()";
		return row;
	}

	struct Reading {
		Clock::duration time{};
		size_t pages = 0, device_bytes = 0;
		bool uncached = false;
	};

	void read(const Cell &cell, const Column &column, unsigned time,
		  const std::deque<Buffer> &buffers, std::vector<Work> &works, Reading &all) const
	{
		const Mount mount(column.device, mount_, {}, column.filesystem);
		std::deque<Source> sources;
		for (unsigned i = 0; i < cell.threads; ++i) {
			sources.emplace_back(mount_ / column.files.at(i % column.files.size()),
					     column.mode);
			auto &work = works[i];
			work.offsets = offsets(cell, time * cell.threads + i, sources[i].size());
			work.latencies.reserve(work.latencies.size() + work.offsets.size());
		}
		const auto before = device_bytes(column.device);
		all.time += timed(cell.threads, [&](unsigned i) {
			if (count_)
				read_uncounted(sources[i], buffers[i], cell.request, works[i]);
			else if (cell.depth)
				read_queued(sources[i], buffers[i], cell.request, cell.depth,
					    works[i]);
			else
				read_in_turn(sources[i], buffers[i], cell.request, works[i]);
		});
		all.device_bytes += device_bytes(column.device) - before;
		size_t pages = 0;
		for (size_t i = 0; i < std::min(sources.size(), column.files.size()); ++i)
			pages += cached_pages(sources[i].fd());
		all.pages = std::max(all.pages, pages);
		all.uncached = sources[0].uncached();
	}

	static std::vector<Clock::duration> all_latencies(const std::vector<Work> &works)
	{
		std::vector<Clock::duration> all;
		for (const auto &work : works)
			all.insert(all.end(), work.latencies.begin(), work.latencies.end());
		return all;
	}

	// Random ones are anywhere in the file: if they were dense, buffered reads would find most
	// of what they need decoded by others. More of them take more mounts.
	static std::vector<size_t> offsets(const Cell &cell, unsigned seed, size_t size)
	{
		const size_t requests = cell.bytes / cell.request;
		std::vector<size_t> all(requests);
		std::mt19937_64 random(seed);
		std::uniform_int_distribution<size_t> any(0, size / cell.request - 1);
		for (size_t i = 0; i < requests; ++i)
			all[i] = (cell.random ? any(random) : i) * cell.request;
		return all;
	}

	// One thread is the caller itself, so that nothing but its work is counted.
	template <typename Do> static Clock::duration timed(unsigned threads, Do work)
	{
		if (threads == 1) {
			const auto start = Clock::now();
			mark<1>();
			work(0);
			mark<2>();
			return Clock::now() - start;
		}
		Clock::time_point start;
		std::barrier ready(threads, [&]() noexcept { start = Clock::now(); });
		std::vector<std::exception_ptr> errors(threads);
		std::vector<std::jthread> running;
		const auto one = [&](unsigned i) {
			ready.arrive_and_wait();
			try {
				work(i);
			} catch (...) {
				errors[i] = std::current_exception();
			}
		};
		for (unsigned i = 0; i < threads; ++i)
			try {
				running.emplace_back(one, i);
			} catch (...) {
				// the others must not wait for it
				errors[i] = std::current_exception();
				ready.arrive_and_drop();
			}
		running.clear();
		const auto time = Clock::now() - start;
		for (const auto &error : errors)
			if (error)
				std::rethrow_exception(error);
		return time;
	}

	fs::path mount_;
	bool count_;
	std::mt19937_64 random_;
	// hashes of what the first column of a cell has read, by thread
	std::vector<uint64_t> first_;
};

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Measures ways to read the files of an EROFS image"};
	std::string plan, mount;
	unsigned rounds = 5;
	bool count = false;
	app.add_option("--plan", plan, "JSON list of cells")->required();
	app.add_option("--mount", mount, "where to mount images, again for each pass")->required();
	app.add_option("--rounds", rounds, "passes of each column");
	app.add_flag("--count", count, "for an emulator that counts: report the first pass, too");
	CLI11_PARSE(app, argc, argv);
	for (const int signal : {SIGHUP, SIGINT, SIGTERM})
		std::signal(signal, [](int) { stopped = 1; });
	try {
		utsname system;
		::uname(&system);
		report({{"kernel", system.release}});
		std::ifstream in(plan);
		Bench bench(mount, count);
		for (const Cell &cell : Json::parse(in).get<std::vector<Cell>>())
			bench.run(cell, rounds);
		return 0;
	} catch (const std::exception &error) {
		report({{"error", error.what()}});
		return 1;
	}
}
