// SPDX-License-Identifier: GPL-2.0-only
// Who reads directly, how long what he reads into lives, and what becomes of it on the way.
// Asynchronous is shown by order: the device is suspended under the filesystem. What must not
// happen meanwhile is given some time to.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <memory>
#include <thread>

#include <CLI/CLI.hpp>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>

#include "async.hpp"
#include "block.hpp"
#include "io.hpp"
#include "ktap.hpp"
#include "leaks.hpp"
#include "memory.hpp"
#include "target.hpp"
#include "trace.hpp"

#ifndef STATX_DIO_READ_ALIGN
#define STATX_DIO_READ_ALIGN 0x20000
#endif

namespace fs = std::filesystem;
using std::size_t;
using Result = std::optional<std::string>;

namespace
{

constexpr size_t kPage = 4096;
constexpr size_t kMiB = 1 << 20;
constexpr std::byte kMark{0xa5};
const std::string kFile = "mixed"; // compressed, of several windows
const std::string kPlain = "noise";
const std::string kLong = "long"; // larger than an asynchronous request may be
const std::array kNested = {"plain.erofs", "lz4-64k.erofs"};
// An image of one directory, all of whose files are in one extent, and one of these files.
const std::string kPacked = "packed.erofs", kPackedDirectory = "sizes", kPackedFile = "4097";

struct Options {
	std::string device, mount, truth, scratch;
};

// What goes on behind the back of a process ends some time after the call that started it.
template <typename Condition>
void eventually(std::string_view what, Condition &&reached,
		std::chrono::seconds limit = std::chrono::seconds(20))
{
	const auto end = std::chrono::steady_clock::now() + limit;
	while (!reached()) {
		if (std::chrono::steady_clock::now() > end)
			throw Error(what, 0, "an end", "none");
		std::this_thread::sleep_for(std::chrono::milliseconds(1));
	}
}

// Whatever is pinned after it was made has to be let go of.
class PinBalance
{
public:
	// Somebody is about to write into pinned pages, and will until he is let.
	void wait_for_pins() const
	{
		eventually("pages pinned for reads", [&] { return more() > 0; });
	}
	long more() const { return held() - before_; }
	void check() const
	{
		eventually("pages pinned for reads that are over",
			   [this] { return held() == before_; });
	}

private:
	static long held()
	{
		const auto pins = Pins::now();
		if (!pins)
			throw Error("/proc/vmstat", 0, "counts of pinned pages", "none");
		return pins->held();
	}

	long before_ = held();
};

// What the tracepoint tells from now on.
class Trace : public PathTrace
{
public:
	Trace() { forget(); }
	void expect_only(const std::set<std::string> &want, std::string_view what) const
	{
		if (const auto got = taken(); got != want)
			throw Error(what, 0, text(want), text(got));
	}
	void expect_some(const std::string &want, const std::set<std::string> &allowed,
			 std::string_view what) const
	{
		const auto got = taken();
		if (!got.contains(want) || !std::ranges::includes(allowed, got))
			throw Error(what, 0, want, text(got));
	}
};

// A process that runs `body` and ends with what it returns.
class Child
{
public:
	explicit Child(const std::function<int()> &body) : pid_(::fork())
	{
		if (pid_ < 0)
			throw Error("fork", 0, "a process", errno_text(errno));
		if (pid_)
			return;
		int code = 99;
		try {
			code = body();
		} catch (const std::exception &error) {
			ktap::line(std::string("    # child: ") + error.what());
		}
		::_exit(code);
	}
	Child(const Child &) = delete;
	Child &operator=(const Child &) = delete;
	~Child()
	{
		if (pid_ > 0) {
			kill();
			status();
		}
	}

	void kill() const { ::kill(pid_, SIGKILL); }
	int status()
	{
		int status = 0;
		if (::waitpid(std::exchange(pid_, 0), &status, 0) < 0)
			throw Error("waitpid", 0, "a status", errno_text(errno));
		return status;
	}
	// Who hangs in the kernel cannot be killed either: he is not waited for any more.
	void expect_success_soon(std::string_view what)
	{
		const auto pid = std::exchange(pid_, 0);
		int status = 0;
		// a machine that emulates and checks takes its time for a thousand threads
		eventually(
			what, [&] { return ::waitpid(pid, &status, WNOHANG) == pid; },
			std::chrono::minutes(2));
		if (status)
			throw Error(what, 0, "status 0", std::to_string(status));
	}
	void expect_success()
	{
		if (const int got = status())
			throw Error("child", 0, "status 0", std::to_string(got));
	}

private:
	pid_t pid_;
};

class Pipe
{
public:
	Pipe()
	{
		std::array<int, 2> ends{};
		if (::pipe2(ends.data(), O_CLOEXEC))
			throw Error("pipe", 0, "a pipe", errno_text(errno));
		read_.emplace(ends[0], "pipe");
		write_.emplace(ends[1], "pipe");
	}

	void give() const
	{
		if (::write(in(), "x", 1) != 1)
			throw Error("pipe", 0, "a byte written", errno_text(errno));
	}
	void take() const
	{
		// who was to give it may be gone
		pollfd ready{out(), POLLIN, 0};
		char byte;
		if (::poll(&ready, 1, 120'000) != 1 || ::read(out(), &byte, 1) != 1)
			throw Error("pipe", 0, "a byte", "none in two minutes");
	}
	int in() const { return *write_; }
	int out() const { return *read_; }

private:
	std::optional<Fd> read_, write_;
};

void expect_untouched(std::string_view what, std::span<const std::byte> bytes,
		      std::byte mark = kMark)
{
	const auto found = std::ranges::find_if(bytes, [mark](auto byte) { return byte != mark; });
	if (found != bytes.end())
		throw Error(what, found - bytes.begin(), "an untouched byte",
			    std::to_string(std::to_integer<int>(*found)));
}

struct Piece {
	size_t offset, length;
};

// From the start of a file on.
std::vector<Piece> consecutive(size_t count, size_t length)
{
	std::vector<Piece> pieces;
	for (size_t i = 0; i < count; ++i)
		pieces.push_back({i * length, length});
	return pieces;
}

enum class Way { aio, uring, worker, fixed };
const std::vector<Way> kAllWays{Way::aio, Way::uring, Way::worker, Way::fixed};

std::optional<std::string> missing(Way way)
{
	if (way == Way::aio ? Aio::available() : Uring::available())
		return {};
	return way == Way::aio ? "the kernel has no AIO" : "the kernel has no io_uring";
}

// Reads of one file into memory of their own, with a page between them that nobody may touch.
class Reads
{
public:
	Reads(const Target &target, std::vector<Piece> pieces, Way way)
	    : target_(target), pieces_(std::move(pieces)), way_(way), memory_(needed(pieces_))
	{
		std::ranges::fill(memory_.bytes(), kMark);
		size_t at = kPage;
		for (const auto &piece : pieces_) {
			places_.push_back({memory_.bytes().data() + at, piece.length});
			at += rounded(piece.length) + kPage;
		}
		for (size_t i = 0; i < pieces_.size(); ++i) {
			requests_.push_back({i, target_.fd, pieces_[i].offset, {&places_[i], 1}});
			requests_[i].worker = way == Way::worker;
			requests_[i].buffer = way == Way::fixed ? 0 : -1;
		}
		const auto depth = static_cast<unsigned>(pieces_.size());
		if (way == Way::aio) {
			queue_ = std::make_unique<Aio>(depth);
			return;
		}
		auto ring = std::make_unique<Uring>(depth);
		const iovec all{memory_.bytes().data(), memory_.bytes().size()};
		if (way == Way::fixed)
			ring->register_buffers({&all, 1});
		queue_ = std::move(ring);
	}

	void submit() { queue_->submit(requests_); }
	void submit(size_t i) { queue_->submit(requests_.at(i)); }
	// A trace and `pins` have to be older than the requests. What is registered has been
	// pinned before.
	void wait_until_begun(const PinBalance &pins) const
	{
		size_t bytes = 0;
		for (const auto &piece : pieces_)
			bytes += rounded(piece.length);
		const auto pages = way_ == Way::fixed ? 0 : static_cast<long>(bytes / kPage);
		eventually("all requests under way without any data", [&] {
			return PathTrace::all().size() >= pieces_.size() && pins.more() >= pages;
		});
	}
	void expect_none()
	{
		if (const auto done = queue_->poll())
			throw Error(target_.path.string(),
				    static_cast<off_t>(pieces_[done->id].offset),
				    "no completion while the device is suspended",
				    std::to_string(done->result));
	}
	void finish()
	{
		while (queue_->in_flight())
			check(queue_->wait());
		check_guards(kMark);
	}
	// Of those who race with somebody, only the length is known.
	void finish_racing(std::byte guard = kMark)
	{
		while (queue_->in_flight())
			check_length(queue_->wait());
		check_guards(guard);
	}
	Queue &queue() { return *queue_; }
	std::span<std::byte> memory() { return memory_.bytes(); }
	std::span<std::byte> place(size_t i)
	{
		return {static_cast<std::byte *>(places_[i].iov_base), places_[i].iov_len};
	}
	std::span<const std::byte> want(size_t i) const
	{
		return target_.expect(pieces_[i].offset, pieces_[i].length);
	}
	void check(const Completion &done)
	{
		check_length(done);
		const auto got = place(done.id);
		expect_bytes(target_.path, pieces_[done.id].offset, want(done.id), got);
		expect_untouched("behind the data", got.subspan(want(done.id).size()));
	}

private:
	static size_t rounded(size_t length) { return (length + kPage - 1) / kPage * kPage; }
	void check_length(const Completion &done) const
	{
		errno = static_cast<int>(-done.result);
		expect(target_.path, pieces_.at(done.id).offset, "bytes",
		       static_cast<ssize_t>(want(done.id).size()), done.result);
	}
	void check_guards(std::byte mark) const
	{
		for (size_t i = 0, at = 0; i <= pieces_.size(); ++i) {
			expect_untouched("between the buffers", memory_.bytes().subspan(at, kPage),
					 mark);
			if (i < pieces_.size())
				at += kPage + rounded(pieces_[i].length);
		}
	}
	static size_t needed(const std::vector<Piece> &pieces)
	{
		size_t sum = kPage;
		for (const auto &piece : pieces)
			sum += rounded(piece.length) + kPage;
		return sum;
	}

	const Target &target_;
	std::vector<Piece> pieces_;
	Way way_;
	Mapping memory_;
	std::vector<iovec> places_;
	std::vector<Request> requests_;
	std::unique_ptr<Queue> queue_; // ends first, and waits
};

// One mounted image.
struct Volume {
	Mount mount;
	Target big;

	Volume(const std::string &node, const Options &options)
	    : mount(node, options.mount),
	      big(open_target(mount.where(), kFile, slurp(fs::path(options.truth) / kFile)))
	{
	}
};

// Indexes have to be read before data can be: afterwards they are cached.
void warm(const Target &target)
{
	const Mapping memory(16 * kMiB);
	expect(target.path, 0, "bytes", 16 * kMiB,
	       ::pread(target.fd, memory.bytes().data(), 16 * kMiB, 0));
	expect_bytes(target.path, 0, target.expect(0, 16 * kMiB), memory.bytes());
}

// Reads whose memory is pinned and whose data does not come until they are resumed.
class HeldReads
{
public:
	HeldReads(Linear &device, const Options &options, Way way)
	    : volume_(device.node(), options),
	      reads_(volume_.big, {{kMiB, kMiB}, {4 * kMiB, 4 * kMiB}}, way)
	{
		warm(volume_.big);
		const Trace trace;
		const PinBalance pins;
		held_.emplace(device);
		reads_.submit();
		reads_.wait_until_begun(pins);
	}

	std::span<std::byte> memory() { return reads_.memory(); }
	Reads &resume()
	{
		held_->resume();
		return reads_;
	}

private:
	Volume volume_;
	Reads reads_;
	std::optional<Suspended> held_; // ends first, or the reads would wait for good
};

// A directory to mount something at, and a control group.
class Directory
{
public:
	explicit Directory(fs::path path) : path_(std::move(path))
	{
		fs::create_directories(path_);
	}
	Directory(const Directory &) = delete;
	Directory &operator=(const Directory &) = delete;
	~Directory() { ::rmdir(path_.c_str()); }
	const fs::path &path() const { return path_; }

private:
	fs::path path_;
};

// False if somebody else has the device for himself, as a mounted file system has.
bool claim(const std::string &node)
{
	const int fd = ::open(node.c_str(), O_RDONLY | O_EXCL | O_CLOEXEC);
	return fd >= 0 && ::close(fd) == 0;
}

std::string device_of(const Target &target)
{
	struct stat info;
	if (::fstat(target.fd, &info))
		throw Error(target.path.string(), 0, "fstat", errno_text(errno));
	return device_number(info.st_dev);
}

size_t stored_bytes(const Target &target)
{
	struct stat info;
	if (::fstat(target.fd, &info))
		throw Error(target.path.string(), 0, "fstat", errno_text(errno));
	return static_cast<size_t>(info.st_blocks) * 512;
}

// What is read of the device below a file from now on.
class DeviceReads
{
public:
	explicit DeviceReads(const Target &target)
	    : what_(target.path), stored_(stored_bytes(target)), device_(device_of(target))
	{
	}
	// Of what the file takes, which has been read as a whole; index blocks are read as well,
	// and some behind its end.
	void expect_quarters(size_t most) const
	{
		const auto limit = stored_ / 4 * most, bytes = this->bytes();
		if (bytes > limit || bytes < stored_ / 4 * 3)
			throw Error(what_.string(), 0,
				    std::to_string(stored_) + " to " + std::to_string(limit) +
					    " bytes of the device",
				    std::to_string(bytes));
	}
	size_t bytes() const { return bytes_read(device_) - before_; }

private:
	fs::path what_;
	size_t stored_;
	std::string device_;
	size_t before_ = bytes_read(device_);
};

// Processes whose reads the kernel counts.
class ControlGroup
{
public:
	ControlGroup()
	    : top_("/tmp/cgroups"), mount_("none", top_.path(), {}, "cgroup2", 0),
	      controller_(top_.path() / "cgroup.subtree_control"), group_(top_.path() / "dio")
	{
	}

	static bool available()
	{
		std::ifstream types("/proc/filesystems");
		for (std::string type; types >> type;)
			if (type == "cgroup2")
				return true;
		return false;
	}

	void join() const { put(group_.path() / "cgroup.procs", "0"); }
	size_t bytes_read(const std::string &device) const
	{
		std::ifstream in(group_.path() / "io.stat");
		const auto start = device + " rbytes=";
		for (std::string line; std::getline(in, line);)
			if (line.starts_with(start))
				return std::stoull(line.substr(start.size()));
		return 0;
	}

private:
	static void put(const fs::path &path, std::string_view text)
	{
		const Fd fd(path, O_WRONLY);
		if (::write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size()))
			throw Error(path.string(), 0, text, errno_text(errno));
	}

	// The one that counts, of all groups from now on.
	class Controller
	{
	public:
		explicit Controller(fs::path control) : control_(std::move(control))
		{
			put(control_, "+io");
		}
		Controller(const Controller &) = delete;
		Controller &operator=(const Controller &) = delete;
		~Controller() { std::ofstream(control_) << "-io"; }

	private:
		fs::path control_;
	};

	Directory top_;
	Mount mount_;
	Controller controller_;
	Directory group_;
};

class Tester
{
public:
	explicit Tester(const Options &options)
	    : options_(options), device_("erofs-dio", options.device)
	{
	}

	Result asynchronous(Way way)
	{
		if (auto reason = missing(way))
			return reason;
		Volume volume(device_.node(), options_);
		warm(volume.big);
		Reads reads(volume.big,
			    {{0, 16 * kPage},
			     {3 * kMiB, kPage},
			     {kMiB, kMiB},
			     {8 * kMiB, 8 * kMiB},
			     {0, 16 * kPage}},
			    way);
		reads.queue().limit_workers(1);
		const Trace trace;
		const PinBalance pins;
		Suspended held(device_);
		reads.submit();
		// who waits for the data of one does not get to the next
		reads.wait_until_begun(pins);
		for (int i = 0; i < 100; ++i) {
			reads.expect_none();
			std::this_thread::yield();
			static_cast<void>(Pins::now()); // any calls into the kernel
		}
		held.resume();
		reads.finish();
		trace.expect_only({"direct"}, "asynchronous reads");
		return {};
	}

	Result nowait()
	{
		Volume volume(device_.node(), options_);
		warm(volume.big);
		const std::vector<Piece> pieces{
			{0, kPage}, {kMiB, kMiB},	    {2 * kMiB, 8 * kMiB},
			{1, 100},   {kMiB + 512, 3 * kMiB}, {volume.big.size(), 4096}};
		try_nowait(volume.big, pieces);
		Suspended held(device_);
		try_nowait(volume.big, pieces);
		held.resume();
		return {};
	}

	Result killed_reader()
	{
		const PinBalance pins;
		lose_reader({}, true);
		auto reason = each(kAllWays, [this](Way way) {
			for (const bool killed : {true, false})
				lose_reader(way, killed);
		});
		pins.check();
		return reason;
	}

	// Data that hardly gets smaller is read in several stages: not in those that are left.
	Result killed_between_stages()
	{
		constexpr size_t kSize = 4 * kMiB, kSlack = 5 * kMiB / 4;
		const PinBalance pins;
		Volume volume(device_.node(), options_);
		const auto target = open_target(volume.mount.where(), kNested.back(),
						slurp(fs::path(options_.truth) / kNested.back()));
		const Mapping memory(kSize);
		const auto read = [&] {
			expect(target.path, kMiB, "bytes", kSize,
			       ::pread(target.fd, memory.bytes().data(), kSize, kMiB));
			return 0;
		};
		const auto device = device_of(target);
		const auto first = bytes_read(device);
		read();
		const auto before = bytes_read(device), whole = before - first;
		if (whole < kSize / 5 * 4)
			return "the file gets smaller";
		Suspended held(device_);
		Child child(read);
		// of the second window, which is staged whatever happens
		eventually("two windows which are pinned",
			   [&] { return static_cast<size_t>(pins.more()) * kPage > kSlack; });
		child.kill();
		held.resume();
		child.status();
		pins.check();
		const auto bytes = bytes_read(device) - before;
		if (!bytes || bytes > kSlack)
			throw Error(target.path.string(), kMiB,
				    std::to_string(kSlack) + " bytes at most for a killed task",
				    std::to_string(bytes));
		return {};
	}

	Result fork_during_read()
	{
		return each({Way::aio, Way::uring, Way::fixed}, [this](Way way) {
			HeldReads held(device_, options_, way);
			const Pipe written, over;
			Child child([&] {
				const auto mine = held.memory();
				std::ranges::fill(mine, std::byte{0x11});
				written.give();
				over.take();
				expect_untouched("the child's copy", mine, std::byte{0x11});
				return 0;
			});
			written.take();
			held.resume().finish();
			over.give();
			child.expect_success();
		});
	}

	Result munmap_during_read()
	{
		return each({Way::aio, Way::uring}, [this](Way way) {
			const PinBalance pins;
			HeldReads held(device_, options_, way);
			const auto bytes = held.memory();
			if (::mmap(bytes.data(), bytes.size(), PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != bytes.data())
				throw Error("mmap", 0, "the same place", errno_text(errno));
			std::ranges::fill(bytes, std::byte{0x22});
			held.resume().finish_racing(std::byte{0x22});
			expect_untouched("a mapping put in place of the buffer", bytes,
					 std::byte{0x22});
			pins.check();
		});
	}

	// A writer spoils what he writes into, and nothing else.
	Result racing_writer_async()
	{
		Volume volume(device_.node(), options_);
		const std::vector<Piece> pieces{
			{0, kMiB}, {kMiB, 4 * kPage}, {2 * kMiB, 3 * kMiB}, {8 * kMiB, 64 * kPage}};
		return each({Way::aio, Way::uring, Way::fixed}, [&](Way way) {
			for (int round = 0; round < 8; ++round) {
				Reads reads(volume.big, pieces, way);
				const std::jthread writer([&](const std::stop_token &stop) {
					for (size_t i = 0; !stop.stop_requested(); i += 61) {
						const auto place = reads.place(i % pieces.size());
						volatile std::byte *byte = &place[i % place.size()];
						*byte = static_cast<std::byte>(i);
					}
				});
				reads.submit();
				reads.finish_racing();
			}
			Reads again(volume.big, pieces, way);
			again.submit();
			again.finish();
			for (const auto &piece : pieces)
				check_buffered(volume.big, piece);
		});
	}

	Result splice_and_sendfile()
	{
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		Trace trace;
		for (const size_t offset : {size_t{0}, 3 * kMiB, 5 * kMiB + 1152}) {
			for (const size_t step : {16 * kPage, size_t{1000}, kMiB}) {
				const auto end = std::min(offset + 20 * step, big.size());
				splice_out(big, offset, end, step);
				send_out(big, offset, end, step);
			}
			splice_out(big, big.size() - 3 * kPage, big.size() + kPage, 16 * kPage);
			send_out(big, big.size() - 3 * kPage, big.size() + kPage, 16 * kPage);
		}
		trace.forget();
		splice_out(big, 0, 8 * kMiB, 16 * kPage);
		trace.expect_only({"direct"}, "splice()");
		send_out(big, 0, 8 * kMiB, 16 * kPage);
		trace.expect_only({"direct"}, "sendfile()");
		return {};
	}

	// In Android, APEX files are images on an image.
	Result loop_device()
	{
		if (!fs::exists("/dev/loop-control"))
			return "the kernel has no loop device";
		Volume volume(device_.node(), options_);
		for (const auto &name : kNested) {
			Trace trace;
			const Loop loop(volume.mount.where() / name);
			if (!loop.direct())
				throw Error(loop.node(), 0, "LO_FLAGS_DIRECT_IO", "no such flag");
			const Directory inside("/tmp/inside");
			const Mount mount(loop.node(), inside.path());
			compare_all(mount.where(), O_RDONLY, 4 * kMiB, true);
			// what holds private data of the image inside is not decoded into
			trace.expect_some("direct", {"direct", "private"}, name);
			compare_all(mount.where(), O_RDONLY | O_DIRECT, 4 * kMiB, true);
		}
		return {};
	}

	Result overlayfs()
	{
		Volume volume(device_.node(), options_);
		const Directory empty("/tmp/empty"), merged("/tmp/merged");
		std::ifstream known("/proc/filesystems");
		const std::string all{std::istreambuf_iterator<char>(known), {}};
		if (all.find("\toverlay\n") == all.npos)
			return "the kernel has no overlayfs";
		const Mount mount("overlay", merged.path(),
				  "lowerdir=" + volume.mount.where().string() + ':' +
					  empty.path().string(),
				  "overlay");
		Trace trace;
		compare_all(mount.where(), O_RDONLY | O_DIRECT, kMiB);
		trace.expect_only({"direct"}, "reads through overlayfs");
		const auto target =
			open_target(mount.where(), kFile, slurp(fs::path(options_.truth) / kFile));
		return each({Way::aio, Way::uring}, [&](Way way) {
			Trace::forget();
			Reads reads(target, {{0, kPage}, {kMiB, kMiB}, {4 * kMiB, 8 * kMiB}}, way);
			reads.submit();
			reads.finish();
			trace.expect_only({"direct"}, "asynchronous reads through overlayfs");
		});
	}

	Result fcntl_direct()
	{
		Volume volume(device_.node(), options_);
		switch_direct(volume.big, "direct");
		switch_direct(open_target(volume.mount.where(), kPlain,
					  slurp(fs::path(options_.truth) / kPlain)),
			      {});
		return {};
	}

	Result statx_alignment()
	{
		Volume volume(device_.node(), options_);
		expect_alignment(volume.big);
		return {};
	}

	Result file_backed_mount()
	{
		const auto copy = image_file();
		if (!copy)
			return "needs --scratch";
		Volume volume(copy->string(), options_);
		expect_alignment(volume.big);
		Trace trace;
		compare_all(volume.mount.where(), O_RDONLY | O_DIRECT, kMiB);
		trace.expect_only({"direct"}, "reads of a file-backed mount");
		return read_each_way(volume.big);
	}

	// Nobody could tell how to align reads.
	Result image_without_device()
	{
		const auto image = fs::path(options_.truth) / kNested.back();
		struct stat info;
		if (::stat(image.c_str(), &info))
			throw Error(image.string(), 0, "stat", errno_text(errno));
		if (major(info.st_dev))
			return "--truth is on a filesystem that has a block device";
		const Mount mount(image, options_.mount);
		const auto target =
			open_target(mount.where(), kFile, slurp(fs::path(options_.truth) / kFile));
		expect_alignment(target);
		const Trace trace;
		compare_all(mount.where(), O_RDONLY | O_DIRECT, kMiB, true);
		auto reason = read_each_way(target);
		trace.expect_only({"no-bdev"}, "reads of an image without a block device");
		return reason;
	}

	Result shared_page_cache()
	{
		Linear other("erofs-dio-other", options_.device);
		const Directory second("/tmp/second");
		const std::string share = "domain_id=dio,inode_share";
		std::optional<Mount> one, two;
		try {
			one.emplace(device_.node(), options_.mount, share);
		} catch (const Unknown &) {
			return "the kernel shares no page cache";
		}
		two.emplace(other.node(), second.path(), share);
		const auto truth = slurp(fs::path(options_.truth) / kFile);
		std::vector<std::byte> bytes(kMiB);
		expect(kFile, 0, "bytes", kMiB,
		       ::pread(Fd(one->where() / kFile, O_RDONLY), bytes.data(), kMiB, 0));
		expect_bytes(one->where() / kFile, 0, std::span(truth).first(kMiB), bytes);
		if (!cached_pages(Fd(two->where() / kFile, O_RDONLY)))
			throw Error(kFile, 0, "a shared page cache", "two of them");
		const auto target =
			open_target(two->where(), kFile, slurp(fs::path(options_.truth) / kFile));
		switch_direct(target, "direct");
		// what is shared does not hang on the one who came first
		if (!one->unmount())
			throw Error(one->where().string(), 0, "a filesystem not in use", "EBUSY");
		compare_all(two->where(), O_RDONLY | O_DIRECT, kMiB);
		return {};
	}

	Result swapped_memory()
	{
		std::ifstream swaps("/proc/swaps");
		std::string line;
		if (!std::getline(swaps, line) || !std::getline(swaps, line))
			return "there is no swap space";
		Volume volume(device_.node(), options_);
		return each({Way::aio, Way::uring}, [&](Way way) {
			Reads reads(volume.big, {{kMiB, kMiB}, {4 * kMiB, 4 * kMiB}}, way);
			const Mapping apart(4 * kMiB);
			std::ranges::fill(apart.bytes(), std::byte{0x33});
			for (const auto &bytes : {reads.memory(), apart.bytes()})
				page_out(bytes);
			const std::jthread reader([&](const std::stop_token &stop) {
				const auto bytes = reads.memory();
				volatile const std::byte *at = bytes.data();
				for (size_t i = 0; !stop.stop_requested(); i += 17 * kPage)
					static_cast<void>(at[i % bytes.size()]);
			});
			reads.submit();
			reads.finish();
			expect_untouched("memory apart from the buffers", apart.bytes(),
					 std::byte{0x33});
		});
	}

	// What is contiguous is decoded into without mapping it.
	Result huge_destinations(std::string_view name)
	{
		Volume volume(device_.node(), options_);
		const std::vector<std::byte> marks(4 * kMiB, kMark);
		const LargeFolios settings;
		const auto &kind = *std::ranges::find(kMemoryKinds, name, &MemoryKind::name);
		try {
			read_into(volume.big, kind.make(kind.size, {marks, {}}).bytes());
		} catch (const Unavailable &reason) {
			return reason.what();
		}
		return {};
	}

	// What one request leaves of an extent serves the next one: nothing is read twice.
	Result sequential_reads_once()
	{
		Volume volume(device_.node(), options_);
		for (const size_t step : {kPage, 16 * kPage, 16 * kPage})
			read_once(volume.big, step);
		return {};
	}

	// All open files share a limit, and nothing is left for one that has been read to its end.
	Result kept_is_bounded()
	{
		if (!kept_pages())
			return "the kernel does not tell what its shrinkers count";
		constexpr size_t kStep = 32 * kPage, kFiles = 64, kRequest = 4 * kMiB / kPage;
		const auto limit = static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) / 256 + kRequest;
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		std::vector<Fd> files;
		size_t most = 0;
		while (files.size() < kFiles) {
			files.emplace_back(big.path, O_RDONLY | O_DIRECT);
			read_singly(big, big.path, files.back(), kStep, 2 * kStep);
			most = std::max(most, kept_pages().value());
		}
		if (!most || most > limit)
			throw Error("pages kept", 0, "1 to " + std::to_string(limit),
				    std::to_string(most));
		// what is being read ahead goes as soon as that is over
		eventually("pages kept when there is no memory", [&] {
			std::ofstream("/proc/sys/vm/drop_caches") << 2;
			return !kept_pages().value();
		});
		read_singly(big, big.path, files.back(), kStep, 2 * kStep);
		files.clear();
		expect("pages kept for closed files", 0, "", 0,
		       static_cast<ssize_t>(kept_pages().value()));
		// what is still being read at the end of a file goes with the next end
		const Fd fd(big.path, O_RDONLY | O_DIRECT);
		eventually("pages kept for a file that has been read", [&] {
			read_singly(big, big.path, fd, kStep, big.size());
			return !kept_pages().value();
		});
		return {};
	}

	// Extents that several small requests need are decoded for the first of them.
	Result small_requests_take_turns(Way way)
	{
		if (auto reason = missing(way))
			return reason;
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		const DeviceReads device(big);
		const Trace trace;
		for (size_t at = 0; at < big.size(); at += kMiB) {
			std::vector<Piece> pieces;
			for (size_t in = at; in < std::min(at + kMiB, big.size()); in += kPage)
				pieces.push_back({in, kPage});
			Reads reads(big, pieces, way);
			reads.submit();
			reads.finish();
		}
		trace.expect_only({"direct"}, "small requests");
		// workers of io_uring submit them in any order
		device.expect_quarters(way == Way::aio ? 5 : 8);
		return {};
	}

	// Whoever waits for his turn is overtaken by a few of those in front of him only.
	Result turns_are_fair()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		constexpr size_t kBehind = 32, kMost = 16;
		Volume volume(device_.node(), options_);
		warm(volume.big);
		// whose turn it is, and the one to be overtaken
		std::vector<Piece> pieces{{kPage, kPage}, {kBehind * kPage, kPage}};
		for (size_t i = 2; i < kBehind; ++i)
			pieces.push_back({i * kPage, kPage});
		Reads reads(volume.big, pieces, Way::aio);
		Suspended held(device_);
		reads.submit();
		held.resume();
		size_t before = 0;
		auto done = reads.queue().wait();
		for (; done.id != 1; ++before, done = reads.queue().wait())
			reads.check(done);
		reads.check(done);
		reads.finish();
		if (before > kMost)
			throw Error(volume.big.path.string(), kBehind * kPage,
				    "at most " + std::to_string(kMost) + " requests before it",
				    std::to_string(before));
		return {};
	}

	// One that comes late does not cost the others what has been read ahead for them.
	Result late_requests()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		constexpr size_t kStep = 4 * kPage;
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		std::vector<Piece> pieces;
		for (size_t at = 0; at + 4 * kStep <= big.size(); at += 4 * kStep)
			for (const size_t i : {0, 2, 1, 3})
				pieces.push_back({at + i * kStep, kStep});
		Reads reads(big, pieces, Way::aio);
		const DeviceReads device(big);
		const Trace trace;
		for (size_t i = 0; i < pieces.size(); ++i) {
			reads.submit(i);
			reads.check(reads.queue().wait());
		}
		reads.finish();
		trace.expect_only({"direct"}, "late requests");
		// the extent it needs is read again
		device.expect_quarters(10);
		return {};
	}

	// A turn that ends with an error is handed over as any other.
	Result turns_of_a_failing_device()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		warm(big);
		Child child([&] {
			fail_in_turns(big);
			return 0;
		});
		child.expect_success_soon("small requests to a device that fails");
		// otherwise what is kept would still belong to one of them
		read_once(big, kPage);
		return {};
	}

	// Who reads into memory that another read has to fill first must not have that one wait.
	Result fault_needs_another_read()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		const auto number = ::syscall(SYS_userfaultfd, O_CLOEXEC);
		if (number < 0 && errno == ENOSYS)
			return "the kernel has no userfaultfd";
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		warm(big);
		const Mapping memory(kPage);
		Reads reads(big, {{2 * kPage, kPage}}, Way::aio);
		ssize_t got = 0;
		int code = 0;
		std::jthread reader;
		const Fd faults(static_cast<int>(number), "userfaultfd"); // ends what waits for it
		const auto control = [&](unsigned long request, void *argument) {
			if (::ioctl(faults, request, argument))
				throw Error("userfaultfd", 0, "success", errno_text(errno));
		};
		uffdio_api api{UFFD_API, 0, 0};
		control(UFFDIO_API, &api);
		const auto address = reinterpret_cast<uintptr_t>(memory.bytes().data());
		uffdio_register range{{address, kPage}, UFFDIO_REGISTER_MODE_MISSING, 0};
		control(UFFDIO_REGISTER, &range);
		reader = std::jthread([&] {
			got = ::pread(big.fd, memory.bytes().data(), kPage, kPage);
			code = errno;
		});
		uffd_msg message;
		pollfd ready{faults, POLLIN, 0};
		if (::poll(&ready, 1, 120'000) != 1 ||
		    ::read(faults, &message, sizeof(message)) != sizeof(message))
			throw Error("userfaultfd", 0, "a page fault", errno_text(errno));
		reads.submit();
		eventually("a read that a page fault waits for", [&] {
			const auto done = reads.queue().poll();
			if (done)
				reads.check(*done);
			return done.has_value();
		});
		uffdio_zeropage zero{{address, kPage}, 0, 0};
		control(UFFDIO_ZEROPAGE, &zero);
		reader.join();
		errno = code;
		expect(big.path, kPage, "bytes", static_cast<ssize_t>(kPage), got);
		expect_bytes(big.path, kPage, big.expect(kPage, kPage), memory.bytes());
		return {};
	}

	// Who closes a file does not wait for what is read ahead of it, but who unmounts does.
	Result close_during_read_ahead()
	{
		if (!kept_pages())
			return "the kernel does not tell what its shrinkers count";
		if (!fs::exists("/dev/loop-control"))
			return "the kernel has no loop device";
		constexpr size_t kStep = 16 * kPage;
		const Volume volume(device_.node(), options_);
		// device mapper does not hold but fail what is read ahead, unless it cannot know
		const Loop loop(volume.mount.where() / kNested.back());
		const Directory inside("/tmp/inside");
		Mount mount(loop.node(), inside.path());
		auto target =
			open_target(mount.where(), kFile, slurp(fs::path(options_.truth) / kFile));
		warm(target);
		const auto device = device_of(target);
		const Mapping memory(kStep);
		// where all of the file is compressed
		constexpr size_t kStart = 4 * kMiB;
		size_t at = kStart, kept = 0;
		const auto read = [&] {
			kept = kept_pages().value();
			expect(target.path, at, "bytes", kStep,
			       ::pread(target.fd, memory.bytes().data(), kStep,
				       static_cast<off_t>(at)));
			at += kStep;
		};
		// it is being read ahead then, which has to end before the device is suspended: the
		// loop device may not even have begun
		while (at < kStart + kMiB / 2)
			read();
		eventually("reads ahead that are over", [&] { return !reads_in_flight(loop); });
		Suspended held(device_);
		const auto before = bytes_read(device);
		// more is read when half of it has been used
		do
			read();
		while (kept_pages().value() < kept + 40);
		target.fd.close();
		std::atomic<bool> unmounted = false;
		Threads end;
		end.start([&] { unmounted = mount.unmount(); });
		std::this_thread::sleep_for(std::chrono::milliseconds(200));
		const bool early = unmounted;
		// nobody else gets the device while it reads
		const bool given_up = claim(loop.node());
		held.resume();
		end.join();
		if (early || given_up || !unmounted || bytes_read(device) == before)
			throw Error(mount.where().string(), 0,
				    "to be unmounted after the last read",
				    bytes_read(device) == before ? "no such read"
				    : given_up			 ? "a device given up before"
				    : early			 ? "unmounted before"
								 : "still in use");
		return {};
	}

	// What could not be read ahead is read when it is needed.
	Result read_ahead_fails()
	{
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		warm(big);
		constexpr size_t step = 16 * kPage;
		const Mapping memory(step);
		const auto read = [&](size_t at) {
			const auto got = ::pread(big.fd, memory.bytes().data(), step,
						 static_cast<off_t>(at));
			if (got < 0)
				return false;
			const auto want = big.expect(at, step);
			expect(big.path, at, "bytes", static_cast<ssize_t>(want.size()), got);
			expect_bytes(big.path, at, want, memory.bytes().first(want.size()));
			return true;
		};
		// what has been kept ends with the extent of the last byte read
		const auto begins_extent = [&](size_t at) {
			const auto next = std::ranges::lower_bound(big.starts, at);
			return next != big.starts.end() && *next < at + step;
		};
		size_t served = 0;
		for (size_t at = 0; at < big.size(); at += step) {
			{
				const Failing failing(device_);
				if (read(at)) {
					served += begins_extent(at);
					at += step;
				}
			}
			if (at < big.size() && !read(at))
				throw Error(big.path.string(), static_cast<off_t>(at), "data",
					    errno_text(errno));
		}
		if (!served)
			throw Error(big.path.string(), 0,
				    "extents that had been read ahead when the device failed",
				    "none");
		return {};
	}

	// A request has no more than a few windows pinned, whatever its length.
	Result bounded_pins()
	{
		Volume volume(device_.node(), options_);
		warm(volume.big);
		const Mapping memory(16 * kMiB);
		const PinBalance pins;
		ssize_t got = 0;
		int code = 0;
		std::jthread reader;
		{
			Suspended suspended(device_);
			reader = std::jthread([&] {
				got = ::pread(volume.big.fd, memory.bytes().data(), 16 * kMiB, 0);
				code = errno;
			});
			pins.wait_for_pins();
			long now = 0;
			for (long last = -1; now != last; last = std::exchange(now, pins.more()))
				std::this_thread::sleep_for(std::chrono::milliseconds(200));
			suspended.resume();
			constexpr auto most = static_cast<long>(4 * kMiB / kPage);
			if (now > most)
				throw Error(volume.big.path.string(), 0,
					    "at most " + std::to_string(most) + " pinned pages",
					    std::to_string(now));
		}
		reader.join();
		errno = code;
		expect(volume.big.path, 0, "bytes", 16 * kMiB, got);
		expect_bytes(volume.big.path, 0, volume.big.expect(0, 16 * kMiB), memory.bytes());
		pins.check();
		return {};
	}

	// Decoding is shared out to CPUs that the reader may use himself, and to no others.
	Result other_cpus_help()
	{
		constexpr std::string_view event = "workqueue/workqueue_execute_start";
		cpu_set_t cpus;
		if (::sched_getaffinity(0, sizeof(cpus), &cpus))
			throw Error("sched_getaffinity", 0, "success", errno_text(errno));
		if (CPU_COUNT(&cpus) < 2)
			return "there is one CPU only";
		if (!EventTrace::available(event))
			return "the kernel does not trace workqueues";
		Volume volume(device_.node(), options_);
		const auto helpers = [&] {
			const EventTrace trace(event);
			EventTrace::forget();
			warm(volume.big);
			return EventTrace::lines(" function z_erofs_dio_help").size();
		};
		// who begins when nothing is left does not help
		eventually("other CPUs that help", [&] { return helpers() > 0; });
		Child alone([&] {
			CPU_ZERO(&cpus);
			CPU_SET(::sched_getcpu(), &cpus);
			if (::sched_setaffinity(0, sizeof(cpus), &cpus))
				return errno;
			expect("helpers of a reader with one CPU", 0, "none", 0,
			       static_cast<ssize_t>(helpers()));
			return 0;
		});
		alone.expect_success();
		return {};
	}

	// A worker may decode for a block device that reclaim waits for.
	Result workers_need_no_io()
	{
		if (!EventTrace::available(kAllocations))
			return "the kernel does not trace allocations";
		size_t folios = 0;
		// compressed data is read into such folios, which are too large for slabs
		const auto reason = each(kAllWays, [&](Way way) {
			Volume volume(device_.node(), options_);
			for (const auto *const who : {"kworker*", "dio_callers"})
				folios += allocations(
					"order >= 4 && order <= 5 && comm ~ \"" + std::string(who) +
						'"',
					[&] {
						Reads reads(volume.big, {{0, 12 * kMiB}}, way);
						reads.submit();
						reads.finish();
					});
		});
		return folios ? reason : reason.value_or("there was no large folio to be had");
	}

	// Whoever helps the reader, too, in whatever he needs.
	Result helpers_need_no_io()
	{
		if (::sysconf(_SC_NPROCESSORS_ONLN) < 2)
			return "there is one CPU only";
		if (!EventTrace::available(kAllocations))
			return "the kernel does not trace allocations";
		Volume volume(device_.node(), options_);
		size_t pages = 0;
		const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
		while (!pages && std::chrono::steady_clock::now() < end)
			// a worker of one CPU and of high priority
			pages = allocations("order == 0 && comm ~ \"kworker/[0-9]*H*\"",
					    [&] { warm(volume.big); });
		return pages ? Result() : "no other CPU has allocated anything";
	}

	// Where somebody has read before, nothing is decoded, nor read once more.
	Result cached_data_is_copied()
	{
		Volume volume(device_.node(), options_);
		const auto &big = volume.big;
		const Piece piece{kMiB, 2 * kMiB};
		check_buffered(big, piece);
		const Mapping memory(piece.length);
		const DeviceReads device(big);
		const Trace trace;
		expect(big.path, piece.offset, "bytes", static_cast<ssize_t>(piece.length),
		       ::pread(big.fd, memory.bytes().data(), piece.length,
			       static_cast<off_t>(piece.offset)));
		trace.expect_only({"direct"}, "a read of cached data");
		expect_bytes(big.path, piece.offset, big.expect(piece.offset, piece.length),
			     memory.bytes());
		expect("the device", 0, "bytes read of it", 0,
		       static_cast<ssize_t>(device.bytes()));
		return {};
	}

	// All memory of an asynchronous request is pinned at once, so there is a limit.
	Result huge_requests_are_synchronous()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		Volume volume(device_.node(), options_);
		const auto target = open_target(volume.mount.where(), kLong,
						slurp(fs::path(options_.truth) / kLong));
		if (target.size() <= 33 * kMiB)
			throw Error(target.path.string(), 0, "more than 33 MiB",
				    std::to_string(target.size()));
		Reads reads(target, {{0, 33 * kMiB}}, Way::aio);
		const Trace trace;
		reads.submit();
		trace.expect_only({"direct"}, "a huge request");
		const auto done = reads.queue().poll();
		if (!done)
			throw Error(target.path.string(), 0, "a request that is over", "none");
		reads.check(*done);
		reads.finish();
		return {};
	}

	// Workers that go on for somebody read on his account.
	Result cgroup_of_submitter()
	{
		if (!ControlGroup::available())
			return "the kernel has no control groups";
		const ControlGroup group;
		return each(kAllWays, [&](Way way) {
			Volume volume(device_.node(), options_);
			const auto device = device_of(volume.big);
			const auto before = bytes_read(device), mine = group.bytes_read(device);
			Child child([&] {
				group.join();
				Reads reads(volume.big, {{0, 12 * kMiB}}, way);
				reads.submit();
				reads.finish();
				// which are read ahead of
				for (size_t at = 12 * kMiB; at < 16 * kMiB; at += kMiB / 4) {
					std::vector<Piece> pieces;
					for (size_t in = 0; in < kMiB / 4; in += kPage)
						pieces.push_back({at + in, kPage});
					Reads small(volume.big, pieces, way);
					small.submit();
					small.finish();
				}
				return 0;
			});
			child.expect_success();
			const auto bytes = bytes_read(device) - before;
			const auto counted = group.bytes_read(device) - mine;
			if (!bytes || counted < bytes - bytes / 16)
				throw Error("io.stat of the reader", 0,
					    std::to_string(bytes) + " bytes of " + device,
					    std::to_string(counted));
		});
	}

	// However many requests there are, few of them hold compressed data.
	Result staging_is_bounded()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		constexpr size_t kRequests = 256, kRequest = 16 * kPage;
		// so many may for each CPU
		const auto most = 3 * kMiB * std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN) / 2);
		const auto free_bytes = [] {
			struct sysinfo info;
			::sysinfo(&info);
			return static_cast<long>(info.freeram * info.mem_unit);
		};
		Volume volume(device_.node(), options_);
		warm(volume.big);
		const auto pieces = consecutive(kRequests, kRequest);
		Reads reads(volume.big, pieces, Way::aio);
		Suspended held(device_);
		const auto before = free_bytes();
		reads.submit();
		const auto used = before - free_bytes();
		held.resume();
		reads.finish();
		if (used > static_cast<long>(most))
			throw Error(volume.big.path.string(), 0,
				    "at most " + std::to_string(most) + " bytes for them",
				    std::to_string(used));
		return {};
	}

	// Whoever submits more and more of them waits before they take all memory.
	Result submission_is_bounded()
	{
		if (auto reason = missing(Way::aio))
			return reason;
		constexpr size_t kRequests = kMostWindows + 64;
		Volume volume(device_.node(), options_);
		warm(volume.big);
		const auto pieces = consecutive(kRequests, kPage);
		Reads reads(volume.big, pieces, Way::aio);
		std::atomic<size_t> submitted = 0;
		Suspended held(device_);
		Threads threads;
		threads.start([&] {
			for (size_t i = 0; i < kRequests; ++i, ++submitted)
				reads.submit(i);
		});
		eventually("as many requests as there may be",
			   [&] { return submitted >= kMostWindows; });
		std::this_thread::sleep_for(std::chrono::milliseconds(200));
		const size_t now = submitted;
		held.resume();
		threads.join();
		reads.finish();
		if (now != kMostWindows)
			throw Error(volume.big.path.string(), 0,
				    std::to_string(kMostWindows) + " requests and no more",
				    std::to_string(now));
		return {};
	}

	Result many_requests()
	{
		Volume volume(device_.node(), options_);
		return each(kAllWays, [&](Way way) {
			const PinBalance pins;
			expect_no_leak([&] {
				size_t reads = 0;
				for (const size_t pages : {256, 16, 16, 16, 16})
					reads += read_many(volume.big, way, pages * kPage);
				pins.check();
				return reads;
			});
		});
	}

	Result unmount_after()
	{
		return each({Way::aio, Way::uring}, [this](Way way) {
			auto truth = slurp(fs::path(options_.truth) / kFile);
			for (int i = 0; i < 100; ++i) {
				Mount mount(device_.node(), options_.mount);
				auto target = open_target(mount.where(), kFile, std::move(truth));
				Reads reads(target,
					    {{0, kPage}, {kMiB, 16 * kPage}, {5 * kMiB, kMiB}},
					    way);
				reads.submit();
				target.fd.close();
				reads.finish();
				truth = std::move(target.truth);
				// the last request lets go of its file behind its completion
				eventually("use of the mounted image",
					   [&] { return mount.unmount(); });
			}
		});
	}

	// So many that all workers a filesystem may have wait for the one that holds its image.
	Result many_nested_requests()
	{
		if (!fs::exists("/dev/loop-control"))
			return "the kernel has no loop device";
		if (auto reason = missing(Way::aio))
			return reason;
		Volume volume(device_.node(), options_);
		const Loop loop(volume.mount.where() / kPacked);
		Linear device("erofs-dio-inside", loop.node());
		const Directory inside("/tmp/inside");
		const Mount mount(device.node(), inside.path());
		const auto target = open_target(
			mount.where(), kPackedFile,
			slurp(fs::path(options_.truth) / kPackedDirectory / kPackedFile));
		if (!target.packed)
			throw Error(target.path.string(), 0, "a fragment", "extents of its own");
		Child child([&] {
			Reads reads(target, std::vector<Piece>(kMoreThanWorkers, {0, kPage}),
				    Way::aio);
			// or the image would be read before the others come
			Suspended held(device);
			reads.submit();
			held.resume();
			reads.finish();
			return 0;
		});
		child.expect_success_soon("many reads of " + target.path.string());
		return {};
	}

private:
	static constexpr std::string_view kAllocations = "kmem/mm_page_alloc";
	static constexpr size_t kMany = 128;
	static constexpr size_t kMostWindows = 1024; // that a superblock has
	static constexpr size_t kMoreThanWorkers = 1000;

	// Why some of it has not been tested.
	static Result each(const std::vector<Way> &ways, const std::function<void(Way)> &body)
	{
		Result reason;
		for (const auto way : ways)
			if (auto why = missing(way))
				reason = std::move(why);
			else
				body(way);
		return reason;
	}

	// How many there are of a kind that must not wait for I/O, apart from slabs and what is
	// charged to a task: io_uring takes notes of its buffers.
	static size_t allocations(const std::string &kind, const std::function<void()> &body)
	{
		const EventTrace trace(kAllocations, kind);
		EventTrace::forget();
		body();
		auto all = EventTrace::lines(" mm_page_alloc: ");
		std::erase_if(all, [](const auto &line) {
			return line.find("_ACCOUNT") != line.npos ||
			       (line.find(" order=0 ") != line.npos &&
				line.find("__GFP_COMP") != line.npos);
		});
		for (const auto &line : all)
			for (const auto *const flag : {"__GFP_IO", "GFP_KERNEL"})
				if (line.find(flag) != line.npos)
					throw Error(kAllocations, 0, "no I/O to get memory", line);
		return all.size();
	}

	static size_t reads_in_flight(const Loop &loop)
	{
		const auto path = "/sys/block" / fs::path(loop.node()).filename() / "inflight";
		std::ifstream in(path);
		size_t reads;
		if (!(in >> reads))
			throw Error(path.string(), 0, "a number of reads", "none");
		return reads;
	}

	// Of all open files.
	static std::optional<size_t> kept_pages()
	{
		const fs::path all = "/sys/kernel/debug/shrinker";
		if (!fs::exists(all))
			return {};
		for (const auto &entry : fs::directory_iterator(all)) {
			if (!entry.path().filename().string().starts_with("erofs-dio-"))
				continue;
			std::ifstream in(entry.path() / "count");
			// a line of the root cgroup, or none if there is nothing
			size_t group, pages = 0;
			in >> group >> pages;
			return pages;
		}
		throw Error(all.string(), 0, "a shrinker of direct reads", "none");
	}

	static void check_buffered(const Target &target, const Piece &piece)
	{
		std::vector<std::byte> bytes(piece.length);
		const auto got = ::pread(Fd(target.path, O_RDONLY), bytes.data(), bytes.size(),
					 static_cast<off_t>(piece.offset));
		expect(target.path, piece.offset, "buffered bytes",
		       static_cast<ssize_t>(piece.length), got);
		expect_bytes(target.path, piece.offset, target.expect(piece.offset, piece.length),
			     bytes);
	}

	static void expect_unsupported(const Target &target, const Piece &piece, ssize_t got)
	{
		if (got != -EOPNOTSUPP)
			throw Error(target.path.string(), static_cast<off_t>(piece.offset),
				    errno_text(EOPNOTSUPP),
				    got < 0 ? errno_text(static_cast<int>(-got))
					    : std::to_string(got) + " bytes");
	}

	static void try_nowait(const Target &target, const std::vector<Piece> &pieces)
	{
		const Mapping memory(8 * kMiB);
		for (const auto &piece : pieces) {
			const iovec part{memory.bytes().data(), piece.length};
			const auto got = ::preadv2(target.fd, &part, 1,
						   static_cast<off_t>(piece.offset), RWF_NOWAIT);
			expect_unsupported(target, piece, got < 0 ? -errno : got);
			for (const auto way : {Way::aio, Way::uring, Way::worker}) {
				if (missing(way))
					continue;
				Request request{0, target.fd, piece.offset, {&part, 1}, RWF_NOWAIT};
				request.worker = way == Way::worker;
				std::unique_ptr<Queue> queue;
				if (way == Way::aio)
					queue = std::make_unique<Aio>(1);
				else
					queue = std::make_unique<Uring>(1);
				queue->submit(request);
				expect_unsupported(target, piece, queue->wait().result);
			}
		}
	}

	// Without a way, it waits in pread().
	void lose_reader(std::optional<Way> way, bool killed)
	{
		const PinBalance pins;
		Volume volume(device_.node(), options_);
		warm(volume.big);
		const Pipe started;
		const Trace trace;
		Suspended held(device_);
		Child child([&] {
			if (!way) {
				const Mapping memory(4 * kMiB);
				return static_cast<int>(
					::pread(volume.big.fd, memory.bytes().data(), 4 * kMiB, 0));
			}
			Reads reads(volume.big, {{0, kMiB}, {4 * kMiB, 4 * kMiB}}, *way);
			const PinBalance mine;
			reads.submit();
			// what has not been started when a process ends is not started any more
			reads.wait_until_begun(mine);
			started.give();
			if (killed)
				reads.finish();
			::_exit(0);
		});
		if (way)
			started.take();
		else
			pins.wait_for_pins();
		if (killed)
			child.kill();
		held.resume();
		const int status = child.status();
		if (killed ? !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL : status)
			throw Error("child", 0, killed ? "SIGKILL" : "status 0",
				    std::to_string(status));
		pins.check();
		volume.big.fd.close();
		eventually("use of the image by a process that is gone",
			   [&] { return volume.mount.unmount(); });
	}

	static void splice_out(const Target &target, size_t offset, size_t end, size_t step)
	{
		const Pipe pipe;
		::fcntl(pipe.in(), F_SETPIPE_SZ, kMiB);
		std::vector<std::byte> bytes(step);
		auto at = static_cast<off_t>(offset);
		while (static_cast<size_t>(at) < end) {
			const auto start = static_cast<size_t>(at);
			const auto want = target.expect(start, step);
			const auto got = ::splice(target.fd, &at, pipe.in(), nullptr, step, 0);
			if (want.empty() && !got)
				return;
			if (got <= 0 || static_cast<size_t>(got) > want.size())
				throw Error(target.path.string(), static_cast<off_t>(start),
					    "up to " + std::to_string(want.size()) + " bytes",
					    got < 0 ? errno_text(errno) : std::to_string(got));
			expect(target.path, start, "as position", static_cast<ssize_t>(start) + got,
			       at);
			expect(target.path, start, "bytes in the pipe", got,
			       ::read(pipe.out(), bytes.data(), static_cast<size_t>(got)));
			expect_bytes(target.path, start, want.first(static_cast<size_t>(got)),
				     bytes);
		}
	}

	static void send_out(const Target &target, size_t offset, size_t end, size_t step)
	{
		const Fd memory(::memfd_create("copy", MFD_CLOEXEC), "memfd");
		auto at = static_cast<off_t>(offset);
		while (static_cast<size_t>(at) < end) {
			const auto got = ::sendfile(memory, target.fd, &at, step);
			if (got < 0)
				throw Error(target.path.string(), at, "bytes", errno_text(errno));
			if (!got)
				break;
		}
		const auto want = target.expect(offset, static_cast<size_t>(at) - offset);
		const auto size = std::min(end, target.size()) - offset;
		if (want.size() < size)
			throw Error(target.path.string(), at, std::to_string(size) + " bytes",
				    std::to_string(want.size()));
		std::vector<std::byte> bytes(want.size() + kPage);
		expect("the copy", 0, "bytes", static_cast<ssize_t>(want.size()),
		       ::pread(memory, bytes.data(), bytes.size(), 0));
		expect_bytes(target.path, offset, want, bytes);
	}

	// All files below `top` with what they were made from; an image inside has no images.
	void compare_all(const fs::path &top, int flags, size_t step = 4 * kMiB,
			 bool inside = false) const
	{
		size_t files = 0;
		for (const auto &name : regular_files(options_.truth)) {
			if (inside &&
			    (name == kPlain || name == kLong || name.extension() == ".erofs"))
				continue;
			compare(top / name, slurp(options_.truth / name), flags, step);
			++files;
		}
		if (!files)
			throw Error(options_.truth, 0, "files", "none");
	}

	static void compare(const fs::path &path, std::span<const std::byte> truth, int flags,
			    size_t step)
	{
		const Mapping memory(step);
		const Fd fd(path, can_be_direct(path) ? flags : flags & ~O_DIRECT);
		for (size_t done = 0; done < truth.size(); done += step) {
			const auto want =
				truth.subspan(done).first(std::min(step, truth.size() - done));
			expect(path, done, "bytes", static_cast<ssize_t>(want.size()),
			       ::pread(fd, memory.bytes().data(), step, static_cast<off_t>(done)));
			expect_bytes(path, done, want, memory.bytes());
		}
	}

	// As if it had been opened that way; nothing in `path` means that no event is due.
	static void switch_direct(const Target &target, const std::string &path)
	{
		const Fd fd(target.path, O_RDONLY);
		const int flags = ::fcntl(fd, F_GETFL);
		const auto length = std::min(16 * kPage, target.size() / 8 / kPage * kPage);
		const Mapping memory(length);
		Trace trace;
		size_t offset = 0;
		for (const bool direct : {false, true, false, true, true}) {
			if (::fcntl(fd, F_SETFL, direct ? flags | O_DIRECT : flags))
				throw Error(target.path.string(), 0, "F_SETFL", errno_text(errno));
			trace.forget();
			expect(target.path, offset, "bytes", static_cast<ssize_t>(length),
			       ::read(fd, memory.bytes().data(), length));
			expect_bytes(target.path, offset, target.expect(offset, length),
				     memory.bytes());
			if (!direct)
				trace.expect_only({}, "a read without O_DIRECT");
			else if (!path.empty())
				trace.expect_only({path}, "a read after F_SETFL");
			offset += length;
			expect(target.path, offset, "as position", static_cast<ssize_t>(offset),
			       ::lseek(fd, 0, SEEK_CUR));
		}
	}

	static struct statx alignment(const fs::path &path)
	{
		struct statx info;
		if (::statx(AT_FDCWD, path.c_str(), 0,
			    STATX_BASIC_STATS | STATX_DIOALIGN | STATX_DIO_READ_ALIGN, &info) ||
		    !(info.stx_mask & STATX_DIOALIGN))
			throw Error(path.string(), 0, "STATX_DIOALIGN", "none");
		return info;
	}

	// Of what Debian 12 calls spare; older kernels do not tell.
	static ssize_t read_alignment(const struct statx &info)
	{
		constexpr size_t kPlace = 0xb4;
		uint32_t value = 0;
		std::memcpy(&value, reinterpret_cast<const std::byte *>(&info) + kPlace,
			    sizeof(value));
		return value;
	}

	// Opening a compressed file always succeeds.
	static bool can_be_direct(const fs::path &path)
	{
		struct statx info;
		if (::statx(AT_FDCWD, path.c_str(), 0, STATX_BASIC_STATS | STATX_DIOALIGN, &info))
			throw Error(path.string(), 0, "statx", errno_text(errno));
		return (info.stx_attributes & STATX_ATTR_COMPRESSED) ||
		       !(info.stx_mask & STATX_DIOALIGN) || info.stx_dio_offset_align;
	}

	// What statx() reports goes direct; with none, nothing does, and with less, nothing either.
	static void expect_alignment(const Target &target)
	{
		const auto info = alignment(target.path);
		const size_t memory = info.stx_dio_mem_align, offset = info.stx_dio_offset_align;
		if (info.stx_mask & STATX_DIO_READ_ALIGN)
			expect(target.path, 0, "bytes to align reads to",
			       static_cast<ssize_t>(offset), read_alignment(info));
		if (!memory != !offset)
			throw Error(target.path.string(), 0, "both alignments or none",
				    std::to_string(memory) + " and " + std::to_string(offset));
		if (!offset) {
			expect_path(target, 16 * kPage, 16 * kPage, 0, "no-bdev");
			return;
		}
		for (const size_t n : {1, 2, 3, 7, 100}) {
			expect_path(target, n * offset, n * offset, n * memory, "direct");
			expect_path(target, n * offset, offset, memory, "direct");
			expect_path(target, n * offset + offset / 2, offset, 0, "misaligned");
			expect_path(target, n * offset, n * offset + offset / 2, 0, "misaligned");
			if (memory > 1)
				expect_path(target, n * offset, offset, n * memory + memory / 2,
					    "misaligned");
		}
	}

	static void expect_path(const Target &target, size_t offset, size_t length, size_t at,
				const std::string &path)
	{
		const Mapping memory(length + at + kPage);
		const auto place = memory.bytes().subspan(at, length);
		Trace trace;
		expect(target.path, offset, "bytes", static_cast<ssize_t>(length),
		       ::pread(target.fd, place.data(), length, static_cast<off_t>(offset)));
		expect_bytes(target.path, offset, target.expect(offset, length), place);
		trace.expect_only({path}, "offset " + std::to_string(offset) + ", length " +
						  std::to_string(length) + ", memory " +
						  std::to_string(at));
	}

	// Whatever is around the destination belongs to the same large folio.
	static void read_into(const Target &target, std::span<std::byte> memory)
	{
		for (const auto &[at, length] : {std::pair{size_t{0}, memory.size()},
						 {kPage, memory.size() - 2 * kPage},
						 {512, 16 * kPage},
						 {memory.size() / 2 - kPage, 2 * kPage}}) {
			std::ranges::fill(memory, kMark);
			Trace trace;
			const auto place = memory.subspan(at, length);
			expect(target.path, kMiB, "bytes", static_cast<ssize_t>(length),
			       ::pread(target.fd, place.data(), length, kMiB));
			trace.expect_only({"direct"}, "a read into large folios");
			expect_bytes(target.path, kMiB, target.expect(kMiB, length), place);
			expect_untouched("before the buffer", memory.first(at));
			expect_untouched("behind the buffer", memory.subspan(at + length));
		}
	}

	// A copy of the image on a filesystem that can be read by page.
	std::optional<fs::path> image_file() const
	{
		if (options_.scratch.empty())
			return {};
		const auto path = fs::path(options_.scratch) / "image.erofs";
		if (!fs::exists(path)) {
			std::ifstream in(options_.device, std::ios::binary);
			std::ofstream out(path, std::ios::binary);
			out << in.rdbuf() << std::flush;
			if (!in || !out)
				throw Error(path.string(), 0, "a copy of the image",
					    "an error: is there room for it?");
			// a RAM disk takes its memory then, and not in the middle of a test that
			// counts
			::sync();
		}
		return path;
	}

	static void page_out(std::span<std::byte> bytes)
	{
		if (::madvise(bytes.data(), bytes.size(), MADV_PAGEOUT))
			throw Error("MADV_PAGEOUT", 0, "success", errno_text(errno));
		std::vector<unsigned char> present(bytes.size() / kPage);
		::mincore(bytes.data(), bytes.size(), present.data());
		if (std::ranges::all_of(present, [](auto flags) { return flags & 1; }))
			throw Error("MADV_PAGEOUT", 0, "pages that are gone", "all of them");
	}

	// In order, with no more to be read than there is.
	static void read_once(const Target &target, size_t step)
	{
		const DeviceReads device(target);
		const Trace trace;
		read_singly(target, target.path, target.fd, step, target.size());
		trace.expect_only({"direct"}, "reads in order by " + std::to_string(step));
		device.expect_quarters(5);
	}

	static Result read_each_way(const Target &target)
	{
		return each(kAllWays, [&](Way way) {
			Reads reads(target, {{0, kPage}, {kMiB, kMiB}, {4 * kMiB, 8 * kMiB}}, way);
			reads.submit();
			reads.finish();
		});
	}

	// While the first one waits for data that is not going to come, the others wait for it.
	void fail_in_turns(const Target &target)
	{
		std::vector<Piece> pieces;
		for (size_t i = 1; i <= 16; ++i)
			pieces.push_back({i * kPage, kPage});
		Reads reads(target, pieces, Way::aio);
		Suspended held(device_);
		reads.submit();
		const Failing failing(device_);
		held.resume();
		size_t errors = 0;
		while (reads.queue().in_flight()) {
			const auto done = reads.queue().wait();
			if (done.result == -EIO)
				++errors;
			else
				reads.check(done);
		}
		if (!errors)
			throw Error(target.path.string(), kPage, "EIO", "data only");
	}

	static size_t read_many(const Target &target, Way way, size_t length)
	{
		std::vector<Piece> pieces;
		for (size_t i = 0; i < kMany; ++i)
			pieces.push_back(
				{i * 37 * kPage % (target.size() / kPage * kPage), length});
		Reads reads(target, std::move(pieces), way);
		reads.submit();
		reads.finish();
		return kMany;
	}

	Options options_;
	Linear device_;
};

std::vector<ktap::Case> all_cases(Tester &tester)
{
	return {
		{"aio_is_asynchronous", [&] { return tester.asynchronous(Way::aio); }},
		{"io_uring_is_asynchronous", [&] { return tester.asynchronous(Way::uring); }},
		{"workers_are_asynchronous", [&] { return tester.asynchronous(Way::worker); }},
		{"fixed_buffers_are_asynchronous", [&] { return tester.asynchronous(Way::fixed); }},
		{"nowait", [&] { return tester.nowait(); }},
		{"killed_reader", [&] { return tester.killed_reader(); }},
		{"killed_between_stages", [&] { return tester.killed_between_stages(); }},
		{"fork_during_read", [&] { return tester.fork_during_read(); }},
		{"munmap_during_read", [&] { return tester.munmap_during_read(); }},
		{"racing_writer_async", [&] { return tester.racing_writer_async(); }},
		{"splice_and_sendfile", [&] { return tester.splice_and_sendfile(); }},
		{"loop_device", [&] { return tester.loop_device(); }},
		{"overlayfs", [&] { return tester.overlayfs(); }},
		{"fcntl_direct", [&] { return tester.fcntl_direct(); }},
		{"statx_alignment", [&] { return tester.statx_alignment(); }},
		{"file_backed_mount", [&] { return tester.file_backed_mount(); }},
		{"image_without_device", [&] { return tester.image_without_device(); }},
		{"shared_page_cache", [&] { return tester.shared_page_cache(); }},
		{"swapped_memory", [&] { return tester.swapped_memory(); }},
		{"huge_destinations_thp", [&] { return tester.huge_destinations("thp"); }},
		{"huge_destinations_mthp", [&] { return tester.huge_destinations("mthp"); }},
		{"huge_destinations_hugetlb", [&] { return tester.huge_destinations("hugetlb"); }},
		{"huge_destinations_memfd", [&] { return tester.huge_destinations("memfd-huge"); }},
		{"sequential_reads_once", [&] { return tester.sequential_reads_once(); }},
		{"kept_is_bounded", [&] { return tester.kept_is_bounded(); }},
		{"small_requests_take_turns",
		 [&] { return tester.small_requests_take_turns(Way::aio); }},
		{"small_requests_of_workers",
		 [&] { return tester.small_requests_take_turns(Way::worker); }},
		{"turns_are_fair", [&] { return tester.turns_are_fair(); }},
		{"late_requests", [&] { return tester.late_requests(); }},
		{"fault_needs_another_read", [&] { return tester.fault_needs_another_read(); }},
		{"read_ahead_fails", [&] { return tester.read_ahead_fails(); }},
		{"close_during_read_ahead", [&] { return tester.close_during_read_ahead(); }},
		{"bounded_pins", [&] { return tester.bounded_pins(); }},
		{"other_cpus_help", [&] { return tester.other_cpus_help(); }},
		{"workers_need_no_io", [&] { return tester.workers_need_no_io(); }},
		{"helpers_need_no_io", [&] { return tester.helpers_need_no_io(); }},
		{"cached_data_is_copied", [&] { return tester.cached_data_is_copied(); }},
		{"huge_requests_are_synchronous",
		 [&] { return tester.huge_requests_are_synchronous(); }},
		{"cgroup_of_submitter", [&] { return tester.cgroup_of_submitter(); }},
		{"many_requests", [&] { return tester.many_requests(); }},
		{"staging_is_bounded", [&] { return tester.staging_is_bounded(); }},
		{"submission_is_bounded", [&] { return tester.submission_is_bounded(); }},
		{"unmount_after", [&] { return tester.unmount_after(); }},
		// last, since whoever hangs there keeps what he uses
		{"turns_of_a_failing_device", [&] { return tester.turns_of_a_failing_device(); }},
		{"many_nested_requests", [&] { return tester.many_nested_requests(); }},
	};
}

bool run_all(const Options &options, const std::string &name, const std::vector<std::string> &only)
{
	Tester tester(options);
	auto cases = all_cases(tester);
	if (!only.empty())
		std::erase_if(cases, [&](const auto &one) {
			return std::ranges::find(only, one.name) == only.end();
		});
	if (cases.empty())
		throw Error("--case", 0, "names of tests", only.front());
	return ktap::run(name, cases);
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{
		"Callers of direct reads of an EROFS image, and the lifetimes of what they use"};
	Options options;
	std::string name = "dio_callers";
	std::vector<std::string> only;
	app.add_option("--device", options.device, "block device with the image")->required();
	app.add_option("--mount", options.mount, "where to mount it")->required();
	app.add_option("--truth", options.truth, "directory with the same files")->required();
	app.add_option("--scratch", options.scratch, "a directory on a block device, for a copy");
	app.add_option("--name", name, "name of the suite in the KTAP output");
	app.add_option("--case", only, "these tests only");
	CLI11_PARSE(app, argc, argv);
	try {
		if (!Linear::available())
			throw Error("/dev/mapper/control", 0, "device mapper", "none");
		return run_all(options, name, only) ? 0 : 1;
	} catch (const std::exception &error) {
		ktap::line(std::string("Bail out! ") + error.what());
		return 1;
	}
}
