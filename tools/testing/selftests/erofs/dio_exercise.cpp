// SPDX-License-Identifier: GPL-2.0-only
// Random direct reads of a mounted image, into any memory and by any system call, compared with
// what another reader finds in the image, or with the files it was made from. What fails is made
// as simple as it can be and printed as a command line.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <thread>

#include <CLI/CLI.hpp>
#include <sys/sendfile.h>
#include <sys/uio.h>

#include "async.hpp"
#include "image.hpp"
#include "io.hpp"
#include "ktap.hpp"
#include "leaks.hpp"
#include "memory.hpp"
#include "reads.hpp"
#include "target.hpp"
#include "trace.hpp"

namespace fs = std::filesystem;
using std::size_t;
using Clock = std::chrono::steady_clock;
using Result = std::optional<std::string>;

namespace
{

constexpr size_t kInFlight = 8;
constexpr size_t kParts = 8;
constexpr size_t kKinds = kMemoryKinds.size();
constexpr size_t kArena = std::ranges::max(kMemoryKinds, {}, &MemoryKind::size).size;

enum class Api {
	pread,
	preadv,
	preadv2,
	read,
	aio,
	uring,
	uring_fixed,
	uring_async,
	splice,
	sendfile
};

struct ApiInfo {
	std::string_view name;
	unsigned weight;
	size_t parts;
	size_t calls;
	bool own_memory; // the destination is the kernel's, not the caller's
};

constexpr std::array kApis{
	ApiInfo{"pread", 4, 1, 1, false},
	ApiInfo{"preadv", 4, kParts, 1, false},
	ApiInfo{"preadv2", 2, kParts, 1, false},
	ApiInfo{"read", 1, 1, 1, false},
	ApiInfo{"aio", 3, kParts, kInFlight, false},
	ApiInfo{"io_uring", 3, kParts, kInFlight, false},
	ApiInfo{"io_uring-fixed", 2, 1, kInFlight, false},
	ApiInfo{"io_uring-async", 2, kParts, kInFlight, false},
	ApiInfo{"splice", 1, 1, 1, true},
	ApiInfo{"sendfile", 1, 1, 1, true},
};

const ApiInfo &info(Api api)
{
	return kApis[static_cast<size_t>(api)];
}

// Calls that are in flight together, where the API can do that.
struct Batch {
	Api api = Api::pread;
	size_t kind = 0;
	std::vector<Call> calls;

	std::string spec() const
	{
		auto text =
			std::string(info(api).name) + '@' + std::string(kMemoryKinds[kind].name);
		for (const auto &call : calls)
			text += ';' + call.spec();
		return text;
	}
};

Batch parse_batch(const std::string &spec)
{
	const auto fields = split(spec, ';');
	const auto at = fields.empty() ? spec.npos : fields[0].find('@');
	if (at == spec.npos || fields.size() < 2)
		throw Error("--replay", 0, "API@MEMORY;CALL[;CALL]...", spec);
	const auto api = std::ranges::find(kApis, fields[0].substr(0, at), &ApiInfo::name);
	const auto kind =
		std::ranges::find(kMemoryKinds, fields[0].substr(at + 1), &MemoryKind::name);
	if (api == kApis.end() || kind == kMemoryKinds.end())
		throw Error("--replay", 0, "a known API and kind of memory", fields[0]);
	Batch batch{static_cast<Api>(api - kApis.begin()),
		    static_cast<size_t>(kind - kMemoryKinds.begin()),
		    {}};
	for (const auto &field : std::span(fields).subspan(1))
		batch.calls.push_back(parse_call(field, kind->size));
	return batch;
}

struct Job {
	const Target &target;
	const Call &call;
	std::vector<iovec> parts;
};

// All the ways to read. Answers are numbers of bytes or -errno.
class Reader
{
public:
	std::vector<ssize_t> read(const Batch &batch, std::span<const Job> jobs,
				  std::span<std::byte> memory)
	{
		switch (batch.api) {
		case Api::aio:
			if (!aio_)
				aio_.emplace(kInFlight);
			return queued(*aio_, jobs, {});
		case Api::uring:
		case Api::uring_async:
			if (!uring_)
				uring_.emplace(kInFlight);
			return queued(*uring_, jobs, {.worker = batch.api == Api::uring_async});
		case Api::uring_fixed:
			return queued(fixed(batch.kind, memory), jobs, {.buffer = 0});
		default:
			std::vector<ssize_t> answers;
			for (const auto &job : jobs)
				answers.push_back(one(batch.api, job));
			return answers;
		}
	}

private:
	struct Flags {
		int buffer = -1;
		bool worker = false;
	};

	static std::vector<ssize_t> queued(Queue &queue, std::span<const Job> jobs, Flags flags)
	{
		std::vector<Request> requests;
		for (const auto &job : jobs)
			requests.push_back({.id = requests.size(),
					    .fd = job.target.fd,
					    .offset = job.call.offset,
					    .parts = job.parts,
					    .buffer = flags.buffer,
					    .worker = flags.worker});
		queue.submit(requests);
		std::vector<ssize_t> answers(jobs.size());
		while (queue.in_flight()) {
			const auto done = queue.wait();
			answers.at(done.id) = done.result;
		}
		return answers;
	}

	Uring &fixed(size_t kind, std::span<std::byte> memory)
	{
		auto &ring = fixed_[kind];
		if (!ring) {
			ring = std::make_unique<Uring>(kInFlight);
			const iovec buffer{memory.data(), memory.size()};
			ring->register_buffers(std::span(&buffer, 1));
		}
		return *ring;
	}

	ssize_t one(Api api, const Job &job)
	{
		const auto offset = static_cast<off_t>(job.call.offset);
		const auto count = static_cast<int>(job.parts.size());
		ssize_t got = -1;
		switch (api) {
		case Api::pread:
			got = ::pread(job.target.fd, job.parts.at(0).iov_base, job.parts[0].iov_len,
				      offset);
			break;
		case Api::preadv2:
			got = ::preadv2(job.target.fd, job.parts.data(), count, offset, RWF_HIPRI);
			break;
		case Api::read:
			return at_position(job);
		case Api::splice:
			return through_pipe(job);
		case Api::sendfile:
			return through_file(job);
		default:
			got = ::preadv(job.target.fd, job.parts.data(), count, offset);
		}
		return got < 0 ? -errno : got;
	}

	static ssize_t at_position(const Job &job)
	{
		const Fd fd(job.target.path, O_RDONLY | O_DIRECT);
		const auto offset = static_cast<off_t>(job.call.offset);
		if (::lseek(fd, offset, SEEK_SET) != offset)
			return -errno;
		const auto got = ::read(fd, job.parts.at(0).iov_base, job.parts[0].iov_len);
		if (got < 0)
			return -errno;
		const auto position = ::lseek(fd, 0, SEEK_CUR);
		if (position != offset + got)
			throw Error(job.target.path.string() + ": position after read()", offset,
				    std::to_string(offset + got), std::to_string(position));
		return got;
	}

	static void scatter(const Job &job, std::span<const std::byte> bytes)
	{
		for (const auto &part : job.parts) {
			const auto some = bytes.first(std::min(part.iov_len, bytes.size()));
			std::ranges::copy(some, static_cast<std::byte *>(part.iov_base));
			bytes = bytes.subspan(some.size());
		}
	}

	// As often as needed for the whole call; the first error counts if it is the first answer.
	template <typename Step> ssize_t repeat(const Job &job, Step step)
	{
		const auto length = job.call.length();
		std::vector<std::byte> bytes;
		ssize_t got = 1;
		while (got > 0 && bytes.size() < length) {
			auto position = static_cast<off_t>(job.call.offset + bytes.size());
			got = step(&position, length - bytes.size(), bytes);
		}
		const int code = errno;
		scatter(job, bytes);
		return got < 0 && bytes.empty() ? -code : static_cast<ssize_t>(bytes.size());
	}

	ssize_t through_pipe(const Job &job)
	{
		return repeat(job, [&](off_t *position, size_t rest, auto &bytes) {
			const auto got = ::splice(job.target.fd, position, pipe_.in, nullptr,
						  std::min(rest, pipe_.size), 0);
			if (got > 0)
				append(bytes, static_cast<size_t>(got), [&](void *to, size_t left) {
					return ::read(pipe_.out, to, left);
				});
			return got;
		});
	}

	ssize_t through_file(const Job &job)
	{
		if (::ftruncate(sink_, 0) || ::lseek(sink_, 0, SEEK_SET))
			throw Error("memfd", 0, "an empty file", errno_text(errno));
		return repeat(job, [&](off_t *position, size_t rest, auto &bytes) {
			const auto got = ::sendfile(sink_, job.target.fd, position, rest);
			if (got > 0)
				append(bytes, static_cast<size_t>(got), [&](void *to, size_t left) {
					return ::pread(sink_, to, left,
						       static_cast<off_t>(bytes.size() - left));
				});
			return got;
		});
	}

	template <typename Take>
	static void append(std::vector<std::byte> &bytes, size_t count, Take take)
	{
		bytes.resize(bytes.size() + count);
		for (auto left = count; left;) {
			const auto got = take(&bytes[bytes.size() - left], left);
			if (got <= 0)
				throw Error("pipe or memfd", 0,
					    std::to_string(left) + " more bytes",
					    got ? errno_text(errno) : "none");
			left -= static_cast<size_t>(got);
		}
	}

	struct Pipe {
		Pipe() : Pipe(ends()) {}
		explicit Pipe(const std::array<int, 2> &fds)
		    : out(fds[0], "pipe"), in(fds[1], "pipe")
		{
			// what it has room for if it cannot be made larger
			if (::fcntl(in, F_SETPIPE_SZ, kMiB) > 0)
				size = kMiB;
		}
		static std::array<int, 2> ends()
		{
			std::array<int, 2> fds{-1, -1};
			if (::pipe2(fds.data(), O_CLOEXEC))
				throw Error("pipe", 0, "success", errno_text(errno));
			return fds;
		}
		Fd out, in;
		size_t size = 65536;
	};

	Pipe pipe_;
	Fd sink_ = memory::memory_file(0, 0);
	std::optional<Aio> aio_;
	std::optional<Uring> uring_;
	std::map<size_t, std::unique_ptr<Uring>> fixed_;
};

class Dice
{
public:
	Dice(uint64_t seed, std::string_view stage, size_t thread)
	{
		std::vector<uint32_t> words{static_cast<uint32_t>(seed),
					    static_cast<uint32_t>(seed >> 32),
					    static_cast<uint32_t>(thread)};
		words.insert(words.end(), stage.begin(), stage.end());
		std::seed_seq sequence(words.begin(), words.end());
		rng_.seed(sequence);
	}
	size_t operator()(size_t below)
	{
		return std::uniform_int_distribution<size_t>(0, below - 1)(rng_);
	}
	template <typename Range> const auto &of(const Range &range)
	{
		return range[(*this)(std::size(range))];
	}
	template <typename Range> void shuffle(Range &range) { std::ranges::shuffle(range, rng_); }

private:
	std::mt19937_64 rng_;
};

// What may be drawn; the dice are thrown in the same way whatever may.
struct Choice {
	std::optional<Api> api = {};
	bool in_turn = false; // all APIs
	std::optional<size_t> kind = {};
	bool aligned = false;
	bool forget = false;	       // what is in the page cache, mostly
	std::set<size_t> without = {}; // kinds
};

struct World {
	std::vector<Target> targets;
	std::array<std::string, kKinds> no_kind; // why, or empty
	std::array<std::string, kApis.size()> no_api;
	fs::path directory;
	uint64_t seed;
	std::vector<std::byte> pattern = noise(kArena, seed);

	const Target &biggest() const
	{
		return *std::ranges::max_element(targets, {}, &Target::size);
	}
	const Target &find(const std::string &name) const
	{
		const auto found = std::ranges::find(targets, name, &Target::name);
		if (found == targets.end())
			throw Error("--replay", 0, "a file of the image", name);
		return *found;
	}
	bool has(size_t kind) const { return no_kind[kind].empty(); }
	bool has(Api api) const { return no_api[static_cast<size_t>(api)].empty(); }
};

// Draws batches: mostly small calls, at edges as often as anywhere.
class Generator
{
public:
	Generator(const World &world, Dice &dice, const Choice &choice)
	    : world_(world), dice_(dice), choice_(choice)
	{
	}

	Batch draw()
	{
		Batch batch{choice_.api.value_or(any_api()), choice_.kind.value_or(any_kind()), {}};
		if (choice_.in_turn)
			batch.api = static_cast<Api>(turn_++ % kApis.size());
		settle(batch);
		const auto &api = info(batch.api);
		const auto size = kMemoryKinds[batch.kind].size;
		size_t at = 0;
		for (auto count = 1 + dice_(api.calls); count; --count) {
			const auto &target = dice_(2) ? world_.biggest() : dice_.of(world_.targets);
			const auto parts = dice_(2) ? 1 : 1 + dice_(api.parts);
			const auto used = at + 2 * kGuard + parts * 2 * kPage;
			if (used + kMinimum > size)
				break;
			batch.calls.push_back(call(target, at, parts, size - used));
			at = (Judge::zone(batch.calls.back()).second + kPage - 1) / kPage * kPage;
		}
		refuse(batch);
		return batch;
	}

private:
	static constexpr size_t kMinimum = 64 * 1024;

	Api any_api()
	{
		auto ticket = dice_(std::accumulate(
			kApis.begin(), kApis.end(), size_t{0},
			[](size_t sum, const auto &api) { return sum + api.weight; }));
		size_t i = 0;
		for (; ticket >= kApis[i].weight; ++i)
			ticket -= kApis[i].weight;
		return static_cast<Api>(i);
	}

	// The small ones are those that cost most to prepare.
	size_t any_kind()
	{
		const auto kind = dice_(3) ? dice_(kKinds) : 0;
		return kMemoryKinds[kind].size < kMiB && dice_(2) ? 0 : kind;
	}

	void settle(Batch &batch) const
	{
		if (!world_.has(batch.api))
			batch.api = Api::preadv;
		if (!world_.has(batch.kind) || choice_.without.contains(batch.kind) ||
		    info(batch.api).own_memory)
			batch.kind = 0;
		if (batch.api == Api::uring_fixed && !kMemoryKinds[batch.kind].registrable)
			batch.api = Api::uring;
	}

	// Nobody promises anything for less aligned reads of files that are not compressed: those
	// that are done step by step might get some bytes.
	void refuse(Batch &batch) const
	{
		if (!info(batch.api).own_memory)
			return;
		for (const auto &call : batch.calls) {
			const auto &target = world_.find(call.file);
			if (!target.compressed && Judge::misaligned(target, call))
				batch.api = Api::preadv;
		}
	}

	static size_t unit(const Target &target)
	{
		return target.direct.offset ? target.direct.offset : target.block;
	}

	size_t shifted(const Target &target, size_t point)
	{
		const std::array<size_t, 5> steps{0, 1, 512, target.block, kPage};
		const auto step = dice_.of(steps);
		return dice_(2) ? point + step : point - std::min(point, step);
	}

	// Starts of extents, page ends, ends of windows and of the file, with their neighbours; or
	// just anything.
	size_t point(const Target &target)
	{
		const auto behind = target.aligned_size() + 2 * target.block;
		const auto any = dice_(behind);
		size_t base = target.size();
		switch (const auto kind = dice_(20)) {
		case 0:
			break;
		case 1:
			base = (any + kMiB / 2) / kMiB * kMiB;
			break;
		case 2:
			base = (any + kPage / 2) / kPage * kPage;
			break;
		default:
			if (kind > 10 || target.starts.empty())
				return any;
			base = dice_.of(target.starts);
		}
		return std::min(shifted(target, base), behind);
	}

	size_t length(const Target &target, size_t offset)
	{
		const auto usual = 1 + dice_(size_t{512} << dice_(9));
		const auto large = 1 + dice_(3 * kMiB);
		const auto next = std::ranges::upper_bound(target.starts, offset);
		const auto skip = static_cast<ptrdiff_t>(dice_(3));
		size_t to_edge = target.size() - std::min(target.size(), offset);
		if (target.starts.end() - next > skip)
			to_edge = *(next + skip) - offset;
		to_edge = shifted(target, to_edge);
		const bool edge = !dice_(3), often = dice_(16), rare = !dice_(128);
		if (edge && to_edge && (to_edge < 256 * 1024 || !often))
			return to_edge;
		return rare ? large : usual;
	}

	Call call(const Target &target, size_t at, size_t parts, size_t room)
	{
		const bool whole = dice_(8) != 0 || choice_.aligned;
		const auto round =
			whole ? dice_(4) ? std::max(target.block, unit(target)) : unit(target) : 1;
		const auto offset = point(target) / round * round;
		auto rest = std::min(length(target, offset), room);
		rest = std::max(rest / round, size_t{1}) * round;
		const std::array<size_t, 6> grains{kPage, 512, 2048, 64, 4, 1};
		auto grain = dice_(2) ? kPage : dice_.of(grains);
		if (choice_.aligned)
			grain = std::max(grain, target.direct.memory ? target.direct.memory : 512);
		Call call{target.name, offset, {}};
		for (auto left = parts; left--;) {
			const auto gap = dice_(2 * kPage) / grain * grain;
			if (dice_(3) || left + 1 == parts)
				at += gap;
			// without a gap, the next part may start less aligned than it may
			at = (at + grain - 1) / grain * grain;
			const auto len = left ? dice_(rest / round + 1) * round : rest;
			call.segments.push_back({at, len});
			at += len;
			rest -= len;
		}
		if (!dice_(4))
			dice_.shuffle(call.segments);
		return call;
	}

	const World &world_;
	Dice &dice_;
	const Choice &choice_;
	size_t turn_ = 0;
};

struct Failed : std::runtime_error {
	Failed(Batch made, const std::string &why) : std::runtime_error(why), batch(std::move(made))
	{
	}
	Batch batch;
};

struct Counts {
	std::array<std::array<size_t, kKinds>, kApis.size()> reads{};
	std::array<size_t, kKinds> prepared{};
	size_t bytes = 0;

	size_t all() const
	{
		size_t sum = 0;
		for (const auto &row : reads)
			sum = std::accumulate(row.begin(), row.end(), sum);
		return sum;
	}
	void add(const Counts &other)
	{
		for (size_t api = 0; api < reads.size(); ++api)
			for (size_t kind = 0; kind < kKinds; ++kind)
				reads[api][kind] += other.reads[api][kind];
		for (size_t kind = 0; kind < kKinds; ++kind)
			prepared[kind] += other.prepared[kind];
		bytes += other.bytes;
	}
};

// One thread's memory, queues and counts.
class Worker
{
public:
	Worker(const World &world, bool forget)
	    : world_(world), forget_(forget), judge_(world.pattern)
	{
	}

	void run(const Batch &batch)
	{
		auto &memory = this->memory(batch.kind);
		const auto bytes = memory.bytes();
		std::vector<Job> jobs;
		for (const auto &call : batch.calls) {
			jobs.push_back({world_.find(call.file), call, call.parts(bytes)});
			const auto [begin, end] = Judge::zone(call);
			memory.prepare(begin, end);
			forget(jobs.back().target, call);
		}
		std::vector<ssize_t> answers;
		try {
			answers = reader_.read(batch, jobs, bytes);
		} catch (const Error &error) {
			throw Failed(batch, error.what());
		}
		std::optional<Error> wrong;
		for (size_t i = 0; i < jobs.size(); ++i) {
			auto verdict = judge_(bytes, jobs[i].target, jobs[i].call, answers[i]);
			if (verdict && !wrong)
				wrong = std::move(verdict);
			counts_.bytes += static_cast<size_t>(std::max<ssize_t>(answers[i], 0));
		}
		counts_.reads[static_cast<size_t>(batch.api)][batch.kind] += jobs.size();
		if (wrong)
			throw Failed(batch, wrong->what());
	}

	// Whatever was written far from where it belongs.
	void inspect()
	{
		for (auto &[kind, memory] : memories_) {
			const auto bytes = memory.bytes();
			memory.prepare(0, bytes.size());
			const auto wrong = std::ranges::mismatch(bytes, world_.pattern).in1;
			const auto at = static_cast<size_t>(wrong - bytes.begin());
			expect_bytes("memory_" + std::string(kMemoryKinds[kind].name), at,
				     std::span(world_.pattern).subspan(at, bytes.size() - at),
				     bytes.subspan(at));
		}
	}

	std::optional<Failed> fails(const Batch &batch)
	{
		auto bytes = memory(batch.kind).bytes();
		judge_.refill(bytes);
		try {
			run(batch);
		} catch (const Failed &failed) {
			return failed;
		}
		return {};
	}

	size_t reads() const { return counts_.all(); }
	Counts counts() const
	{
		auto counts = counts_;
		for (const auto &[kind, memory] : memories_)
			counts.prepared[kind] = memory.prepared();
		return counts;
	}

private:
	Memory &memory(size_t kind)
	{
		auto found = memories_.find(kind);
		if (found == memories_.end()) {
			const auto &[name, size, registrable, make] = kMemoryKinds[kind];
			found = memories_
					.emplace(kind,
						 make(size, {world_.pattern, world_.directory}))
					.first;
		}
		return found->second;
	}

	// What misaligned reads have left in the page cache is not decoded, but copied from there.
	// That is to happen, too, and large extents are not to be decoded over and over.
	void forget(const Target &target, const Call &call)
	{
		constexpr size_t kPerCall = 64 * 1024;
		if (!forget_ || ++calls_ % 4 == 0 || decoded_ > calls_ * kPerCall)
			return;
		target.uncache();
		decoded_ += target.decoded(call.offset, call.length());
	}

	const World &world_;
	bool forget_;
	size_t calls_ = 0, decoded_ = 0;
	Judge judge_;
	std::map<size_t, Memory> memories_;
	Counts counts_;
	Reader reader_; // last, since its rings must end before the memory
};

// What might fail, too, and is simpler: the boldest first.
std::vector<Batch> simpler(const World &world, const Batch &batch)
{
	std::vector<Batch> all;
	const auto with = [&](size_t i, const Call &call) {
		if (call == batch.calls[i])
			return;
		all.push_back(batch);
		all.back().calls[i] = call;
	};
	for (size_t i = 0; i < batch.calls.size() && batch.calls.size() > 1; ++i) {
		all.push_back({batch.api, batch.kind, {batch.calls[i]}});
		all.push_back(batch);
		all.back().calls.erase(all.back().calls.begin() + static_cast<ptrdiff_t>(i));
	}
	const bool one = std::ranges::all_of(
		batch.calls, [](const auto &call) { return call.segments.size() == 1; });
	const auto plain = one ? Api::pread : Api::preadv;
	if (batch.api != plain)
		all.push_back({plain, batch.kind, batch.calls});
	if (batch.kind)
		all.push_back({batch.api, 0, batch.calls});
	for (size_t i = 0; i < batch.calls.size(); ++i) {
		const auto &call = batch.calls[i];
		const auto &segments = call.segments;
		if (segments.size() > 1) {
			with(i, {call.file, call.offset, {{segments[0].at, call.length()}}});
			const auto first = segments.begin(), last = segments.end() - 1;
			with(i, {call.file, call.offset + first->len, {first + 1, segments.end()}});
			with(i, {call.file, call.offset, {first, last}});
		}
		auto moved = call;
		for (auto &segment : moved.segments)
			segment.at = segments.size() > 1 ? segment.at / kPage * kPage : 0;
		// parts that overlap then are another case
		if (segments.size() == 1 ||
		    std::ranges::adjacent_find(moved.segments, [](const auto &a, const auto &b) {
			    return a.at + a.len > b.at;
		    }) == moved.segments.end())
			with(i, moved);
		const auto block = world.find(call.file).block;
		std::vector<size_t> cuts;
		for (auto cut = call.length() / 2; cut; cut /= 2)
			cuts.push_back(cut > block ? cut / block * block : cut);
		for (const auto cut : cuts) {
			if (segments.back().len > cut) {
				auto shorter = call;
				shorter.segments.back().len -= cut;
				with(i, shorter);
			}
			if (segments.front().len > cut) {
				auto shorter = call;
				shorter.offset += cut;
				shorter.segments.front().len -= cut;
				with(i, shorter);
			}
		}
	}
	return all;
}

std::string shrunk(const World &world, const Failed &found)
try {
	constexpr size_t kTries = 3000;
	Worker worker(world, true);
	std::optional<Failed> least;
	for (size_t i = 0; i < 10 && !least; ++i)
		least = worker.fails(found.batch);
	if (!least)
		return std::string(found.what()) +
		       "; not again on its own: dio_exercise --replay '" + found.batch.spec() + "'";
	bool better = true;
	for (size_t tries = 0; better && tries < kTries;) {
		better = false;
		for (const auto &batch : simpler(world, least->batch)) {
			if (++tries > kTries)
				break;
			if (auto failed = worker.fails(batch)) {
				least = std::move(failed);
				better = true;
				break;
			}
		}
	}
	return std::string(found.what()) + "; the simplest that fails: " + least->what() +
	       "; dio_exercise --replay '" + least->batch.spec() + "'";
} catch (const std::exception &error) {
	return std::string(found.what()) + "; dio_exercise --replay '" + found.batch.spec() +
	       "'; while it was made simpler: " + error.what();
}

class Exerciser
{
public:
	Exerciser(World world, size_t reads, double seconds, size_t threads)
	    : world_(std::move(world)), reads_(reads), seconds_(seconds), threads_(threads)
	{
		for (size_t kind = 0; kind < kKinds; ++kind) {
			try {
				kMemoryKinds[kind].make(kMemoryKinds[kind].size,
							{world_.pattern, world_.directory});
			} catch (const Unavailable &reason) {
				world_.no_kind[kind] = reason.what();
			}
		}
		if (!Aio::available())
			no(Api::aio) = "the kernel has no AIO";
		if (!Uring::available())
			for (const auto api : {Api::uring, Api::uring_fixed, Api::uring_async})
				no(api) = "the kernel has no io_uring";
	}

	// First, since other reads leave pages in the cache.
	Result nothing_cached()
	{
		std::ofstream("/proc/sys/vm/drop_caches") << 1;
		std::vector<size_t> before;
		for (const auto &target : world_.targets)
			before.push_back(cached_pages(target.fd));
		const PathTrace trace("path != 0");
		PathTrace::forget();
		random("nothing_cached", 0.05, 1, all_direct());
		const auto taken = PathTrace::taken();
		if (!taken.empty())
			throw Error("aligned reads", 0, "direct ones only", *taken.begin());
		for (size_t i = 0; i < before.size(); ++i) {
			const auto &target = world_.targets[i];
			const auto after = cached_pages(target.fd);
			if (after > before[i])
				throw Error(target.path.string(), 0,
					    std::to_string(before[i]) + " cached pages",
					    std::to_string(after));
		}
		return {};
	}

	// Each pair of block boundaries near edges of extents that are not far from each other.
	Result edges()
	{
		Worker worker(world_, false);
		try {
			for (const auto &target : world_.targets)
				for (const auto &[begin, end] : near_edges(target))
					worker.run({Api::pread,
						    0,
						    {{target.name, begin, {{0, end - begin}}}}});
			worker.inspect();
		} catch (const Failed &failed) {
			throw std::runtime_error(shrunk(world_, failed));
		}
		tell(worker.counts());
		return {};
	}

	Result random_reads()
	{
		random("random_reads", 0.5, 1, {.forget = true});
		return {};
	}
	Result parallel_reads()
	{
		std::ofstream("/proc/sys/vm/drop_caches") << 1;
		random("parallel_direct", 0.05, threads_, all_direct());
		random("parallel_reads", 0.15, threads_, {});
		return {};
	}

	Result with_kind(size_t kind)
	{
		if (!world_.has(kind))
			return world_.no_kind[kind];
		random(kMemoryKinds[kind].name, 0.02, 1,
		       {.in_turn = true, .kind = kind, .forget = true});
		return {};
	}

	Result with_api(size_t index)
	{
		const auto api = static_cast<Api>(index);
		if (!world_.has(api))
			return no(api);
		random(kApis[index].name, 0.01, 1, {.api = api, .forget = true});
		return {};
	}

	// Disks in memory never give back what was once written to them.
	Result memory_returned()
	{
		if (keeps_freed_memory())
			return "kmemleak looks for leaks";
		auto choice = all_direct();
		choice.without.insert(kind("swapped"));
		expect_no_leak([&] { return random("memory_returned", 0.1, threads_, choice); });
		return {};
	}

	void replay(const Batch &batch)
	{
		if (!world_.has(batch.kind) || !world_.has(batch.api))
			throw Error("--replay", 0, "available API and memory",
				    no(batch.api) + world_.no_kind[batch.kind]);
		Worker worker(world_, true);
		// decoded, and once more with what that has left in the page cache
		for (int i = 0; i < 4; ++i)
			worker.run(batch);
		worker.inspect();
	}

	bool run_all(const std::string &name)
	{
		std::vector<ktap::Case> cases{
			{"nothing_cached", [this] { return nothing_cached(); }},
			{"edges", [this] { return edges(); }},
			{"random_reads", [this] { return random_reads(); }},
			{"parallel_reads", [this] { return parallel_reads(); }},
		};
		for (size_t kind = 0; kind < kKinds; ++kind)
			cases.push_back({name_of("memory_", kMemoryKinds[kind].name),
					 [this, kind] { return with_kind(kind); }});
		for (size_t api = 0; api < kApis.size(); ++api)
			cases.push_back({name_of("api_", kApis[api].name),
					 [this, api] { return with_api(api); }});
		cases.push_back({"memory_returned", [this] { return memory_returned(); }});
		cases.push_back({"pins_released", [this] {
					 summary();
					 return pins_released();
				 }});
		ktap::line("# seed " + std::to_string(world_.seed));
		return ktap::run(name, cases);
	}

private:
	std::string_view name_of(std::string_view prefix, std::string_view name)
	{
		names_.push_back(std::make_unique<std::string>(prefix));
		return *names_.back() += name;
	}

	std::string &no(Api api) { return world_.no_api[static_cast<size_t>(api)]; }

	static size_t kind(std::string_view name)
	{
		return static_cast<size_t>(
			std::ranges::find(kMemoryKinds, name, &MemoryKind::name) -
			kMemoryKinds.begin());
	}

	static Choice all_direct() { return {.aligned = true, .without = {kind("private-data")}}; }

	// What each thread reads depends on the seed alone; the clock can only end it.
	size_t random(std::string_view stage, double share, size_t threads, const Choice &choice)
	{
		const auto reads = std::max<size_t>(
			static_cast<size_t>(static_cast<double>(reads_) * share), 20);
		const auto end = Clock::now() + std::chrono::duration<double>(seconds_ * share);
		std::atomic<bool> stop = false;
		std::mutex lock;
		std::optional<Failed> failed;
		std::string trouble;
		Counts sum;
		const auto work = [&](size_t thread) {
			try {
				Worker worker(world_, choice.forget);
				Dice dice(world_.seed, stage, thread);
				Generator generator(world_, dice, choice);
				const auto more = [&] {
					return seconds_ > 0 ? Clock::now() < end
							    : worker.reads() < reads / threads;
				};
				size_t number = 0;
				try {
					for (; !stop && more(); ++number)
						worker.run(generator.draw());
					worker.inspect();
				} catch (const Failed &failure) {
					throw Failed(failure.batch,
						     "seed " + std::to_string(world_.seed) + ", " +
							     std::string(stage) + ", thread " +
							     std::to_string(thread) + ", call " +
							     std::to_string(number) + ": " +
							     failure.what());
				}
				const std::scoped_lock guard(lock);
				sum.add(worker.counts());
			} catch (const Failed &failure) {
				const std::scoped_lock guard(lock);
				if (!failed)
					failed.emplace(failure);
				stop = true;
			} catch (const std::exception &error) {
				const std::scoped_lock guard(lock);
				trouble = error.what();
				stop = true;
			}
		};
		const auto start = Clock::now();
		{
			std::vector<std::jthread> others;
			for (size_t thread = 1; thread < threads; ++thread)
				others.emplace_back(work, thread);
			work(0);
		}
		const std::chrono::duration<double> taken = Clock::now() - start;
		tell(sum, taken.count());
		if (failed)
			throw std::runtime_error(shrunk(world_, *failed));
		if (!trouble.empty())
			throw std::runtime_error(trouble);
		return sum.all();
	}

	void tell(const Counts &counts, double seconds = 0)
	{
		total_.add(counts);
		auto text = "    # " + std::to_string(counts.all()) + " reads, " +
			    std::to_string(counts.bytes / kMiB) + " MiB";
		if (seconds > 0)
			text += ", " +
				std::to_string(static_cast<size_t>(
					static_cast<double>(counts.bytes) / seconds / kMiB)) +
				" MiB/s";
		ktap::line(text);
	}

	void summary() const
	{
		for (size_t kind = 0; kind < kKinds; ++kind) {
			if (!world_.has(kind))
				continue;
			auto text = "    # " + std::string(kMemoryKinds[kind].name) + ':';
			for (size_t api = 0; api < kApis.size(); ++api)
				text += ' ' + std::string(kApis[api].name) + ' ' +
					std::to_string(total_.reads[api][kind]);
			if (total_.prepared[kind])
				text += ", pages prepared " + std::to_string(total_.prepared[kind]);
			ktap::line(text);
		}
	}

	std::set<std::pair<size_t, size_t>> near_edges(const Target &target) const
	{
		constexpr size_t kNear = 3;
		const auto block = target.block;
		auto edges = target.starts;
		edges.push_back(0);
		edges.push_back(target.size());
		std::ranges::sort(edges);
		edges.erase(std::unique(edges.begin(), edges.end()), edges.end());
		const auto around = [&](size_t edge) {
			std::vector<size_t> points;
			const auto middle = edge / block;
			for (auto i = middle - std::min(middle, kNear); i <= middle + kNear; ++i)
				points.push_back(i * block);
			return points;
		};
		std::set<std::pair<size_t, size_t>> all;
		// a large file has too many edges for all of them
		const auto step = edges.size() / 128 + 1;
		for (size_t i = 0; i < edges.size(); i += step)
			for (size_t j = i; j < std::min(i + 3, edges.size()); ++j)
				for (const auto begin : around(edges[i]))
					for (const auto end : around(edges[j]))
						if (begin < end && end - begin <= kLongest)
							all.emplace(begin, end);
		thin(all, target);
		return all;
	}

	// No more than can be decoded in a few seconds.
	static void thin(std::set<std::pair<size_t, size_t>> &ranges, const Target &target)
	{
		constexpr size_t kMost = 64 * kMiB;
		size_t sum = 0, number = 0;
		for (const auto &[begin, end] : ranges)
			sum += target.decoded(begin, end - begin);
		const auto every = sum / kMost + 1;
		std::erase_if(ranges, [&](const auto &) { return number++ % every != 0; });
	}

	static constexpr size_t kLongest = kArena - 2 * kGuard;

	World world_;
	size_t reads_;
	double seconds_;
	size_t threads_;
	Counts total_;
	std::vector<std::unique_ptr<std::string>> names_;
};

// The truth, by name.
using Files = std::map<std::string, std::vector<std::byte>>;

Files files_of(const fs::path &truth)
{
	Files files;
	for (const auto &name : regular_files(truth))
		files.emplace(name, slurp(truth / name));
	return files;
}

Files files_of(const std::vector<fs::path> &devices)
{
	const erofs::Image image(devices.front(), {devices.begin() + 1, devices.end()});
	Files files;
	for (const auto &entry : image.files())
		files.emplace(entry.path, image.read(entry));
	return files;
}

World explore(const fs::path &mount, Files files, const fs::path &directory, uint64_t seed)
{
	World world{{}, {}, {}, directory, seed};
	for (auto &[name, truth] : files)
		world.targets.push_back(open_target(mount, name, std::move(truth)));
	if (world.targets.empty())
		throw Error(mount.string(), 0, "files", "none");
	return world;
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Random direct reads of a mounted EROFS image, into any memory, by any call"};
	std::string mount, truth, name = "dio_exercise", spec, directory;
	uint64_t seed = 1;
	size_t reads = 5000, threads = 4;
	double seconds = 0;
	app.add_option("--mount", mount, "where the image is mounted")->required();
	std::vector<fs::path> devices;
	app.add_option("--device", devices,
		       "the image, then its extra devices: what is there is the truth");
	auto *const same = app.add_option("--truth", truth, "or a directory with the same files");
	app.get_option("--device")->excludes(same);
	app.add_option("--private", directory,
		       "a directory of a filesystem that keeps private data in folios");
	app.add_option("--name", name, "name of the suite in the KTAP output");
	app.add_option("--seed", seed, "seed of all that is random");
	app.add_option("--reads", reads, "number of random reads, about");
	app.add_option("--seconds", seconds, "read for so long instead");
	app.add_option("--threads", threads, "number of threads that read in parallel")
		->check(CLI::Range(1, 64));
	app.add_option("--replay", spec,
		       "make only these: API@MEMORY;FILE,OFFSET,AT+LEN[,AT+LEN]...[;FILE...]...");
	CLI11_PARSE(app, argc, argv);
	try {
		if (devices.empty() && truth.empty())
			throw Error("the truth", 0, "--device or --truth", "neither");
		const LargeFolios large;
		auto files = devices.empty() ? files_of(fs::path(truth)) : files_of(devices);
		Exerciser exerciser(explore(mount, std::move(files), directory, seed), reads,
				    seconds, threads);
		if (spec.empty())
			return exerciser.run_all(name) ? 0 : 1;
		const ktap::Case replay{"replay", [&] {
						exerciser.replay(parse_batch(spec));
						return std::nullopt;
					}};
		return ktap::run(name, {replay}) ? 0 : 1;
	} catch (const std::exception &error) {
		ktap::line(std::string("Bail out! ") + error.what());
		return 1;
	}
}
