// SPDX-License-Identifier: GPL-2.0-only
// Direct reads of images on devices that are not like the one an image usually lies on.

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>

#include <CLI/CLI.hpp>

#include "async.hpp"
#include "block.hpp"
#include "image.hpp"
#include "io.hpp"
#include "ktap.hpp"
#include "reads.hpp"
#include "target.hpp"
#include "trace.hpp"

namespace fs = std::filesystem;
using std::size_t;
using Result = std::optional<std::string>;

namespace
{

constexpr size_t kArena = 8 * kMiB;
constexpr size_t kSector = 512, kLarge = 4096;

struct Options {
	std::string plain, spread, fine, fine_extra, far, far_extra, mount, scratch;
	std::vector<fs::path> extra;
};

// A mounted image, its files and what they have to contain.
class Volume
{
public:
	Volume(const erofs::Image &image, const std::string &node, const std::string &where,
	       const std::string &options = {})
	    : mount_(node, where, options)
	{
		for (const auto &entry : image.files())
			files_.push_back(open_target(mount_.where(), entry.path.string(),
						     image.read(entry)));
	}

	const std::vector<Target> &files() const { return files_; }
	const Target &file(std::string_view name) const
	{
		const auto found = std::ranges::find(files_, name, &Target::name);
		if (found == files_.end())
			throw Error(mount_.where().string(), 0, "a file " + std::string(name),
				    "none");
		return *found;
	}

private:
	Mount mount_;
	std::vector<Target> files_;
};

class Tester
{
public:
	explicit Tester(Options options)
	    : options_(std::move(options)), arena_(kArena), pattern_(noise(kArena, 1)),
	      judge_(pattern_)
	{
		// neighbours should not be such physically, or pieces of memory become one
		::madvise(arena_.bytes().data(), kArena, MADV_NOHUGEPAGE);
		for (size_t i = 0; i < kArena / kPage; ++i)
			arena_.bytes()[i * 37 % (kArena / kPage) * kPage] = std::byte{};
		judge_.refill(arena_.bytes());
	}

	// Memory needs to be aligned less than the blocks are large.
	Result large_logical_blocks()
	{
		const Loop loop(options_.plain, kLarge);
		const Volume volume(erofs::Image(options_.plain), loop.node(), options_.mount);
		expect_alignment(volume, kLarge);
		read_all(volume, kLarge);
		return {};
	}

	// Windows end at blocks of the device below the file that the image is in.
	Result smaller_blocks_than_below()
	{
		read_file("small", "");
		return {};
	}

	// Blocks smaller than those below could not be read that way.
	Result file_read_directly()
	{
		read_file("plain", "directio");
		return {};
	}

	// The alignment that reads must have is that of the first one.
	Result second_device_with_large_blocks()
	{
		for (size_t large = 0; large < options_.extra.size(); ++large) {
			const Loop loop(options_.extra[large], kLarge);
			auto devices = options_.extra;
			devices[large] = loop.node();
			const auto volume = spread(devices);
			expect_alignment(volume, kSector);
			read_all(volume, kSector);
		}
		return {};
	}

	// What starts a block of the device in the file and in memory need not do so on the device.
	Result small_blocks_on_large_ones()
	{
		const Loop loop(options_.fine_extra, kLarge);
		const Volume volume(erofs::Image(options_.fine, {options_.fine_extra}),
				    options_.fine, options_.mount, "device=" + loop.node());
		expect_alignment(volume, kSector);
		read_buffered(volume);
		read_all(volume, kSector);
		read_all(volume, kLarge);
		return {};
	}

	// Where extents do not follow each other on the device, nobody needs what is behind them.
	Result little_read_in_vain()
	{
		constexpr size_t kStep = 64 * 1024, kGuess = 512 * 1024, kGuesses = 3;
		const auto volume = spread(options_.extra);
		const auto &target = volume.file("backwards");
		struct stat device, owner;
		if (::stat(options_.extra[0].c_str(), &device) ||
		    ::fstat(volume.file("one").fd, &owner))
			throw Error(target.path.string(), 0, "stat", errno_text(errno));
		const auto number = device_number(device.st_rdev);
		const auto stored = static_cast<size_t>(owner.st_blocks) * kSector;
		const auto before = bytes_read(number);
		read_singly(target, target.path, target.fd, kStep, target.size());
		const auto bytes = bytes_read(number) - before;
		if (bytes < stored / 2 || bytes > stored + stored / 4 + kGuesses * kGuess)
			throw Error(target.path.string(), 0,
				    std::to_string(stored) + " bytes and a few guesses read",
				    std::to_string(bytes));
		return {};
	}

	Result image_behind_something()
	{
		constexpr uint64_t kFront = 3 * kLarge;
		const auto sectors = device_size(options_.plain) / kSector;
		const Linear device("erofs-dio-behind", options_.plain,
				    {{kFront / kSector, sectors / 2}, {sectors, 0}});
		std::unique_ptr<Volume> volume;
		try {
			volume = std::make_unique<Volume>(erofs::Image(options_.plain),
							  device.node(), options_.mount,
							  "fsoffset=" + std::to_string(kFront));
		} catch (const Unknown &) {
			return "the kernel knows no fsoffset";
		}
		read_all(*volume, kSector);
		return {};
	}

	// Whoever looks up a fragment stores where it is: nobody may see a half of that.
	Result fragment_looked_up_by_others()
	{
		constexpr size_t kReads = 20000;
		if (std::thread::hardware_concurrency() < 2)
			return "there is one CPU";
		const Volume volume(erofs::Image(options_.far, {options_.far_extra}), options_.far,
				    options_.mount, "device=" + options_.far_extra);
		const auto &target = volume.file("fragment");
		const std::jthread other([&](const std::stop_token &ended) {
			while (!ended.stop_requested())
				extents(target.fd);
		});
		const auto memory = arena_.bytes().first(kPage);
		const auto last = (target.size() - 1) / kPage * kPage;
		for (size_t i = 0; i < kReads; ++i) {
			const auto got = ::pread(target.fd, memory.data(), memory.size(),
						 static_cast<off_t>(last));
			if (got != static_cast<ssize_t>(target.size() - last))
				throw Error(target.path.string(), static_cast<off_t>(last),
					    std::to_string(target.size() - last) + " bytes",
					    got < 0 ? errno_text(errno) : std::to_string(got));
			expect_bytes(target.path, last, target.expect(last, kPage), memory);
		}
		return {};
	}

	// Of plain blocks, nobody but the device knows; all others read what is around as before.
	Result failing_device()
	{
		const erofs::Image image(options_.plain);
		for (const auto &[name, index] : {std::pair{"run", size_t{150}},
						  {"run", 0},
						  {"large", 0},
						  {"interlaced", 1},
						  {"data", 1}})
			fail_at(image, name, index);
		return {};
	}

private:
	void check(const Target &target, const Call &call)
	{
		target.uncache();
		const auto parts = call.parts(arena_.bytes());
		const auto answer =
			::preadv(target.fd, parts.data(), static_cast<int>(parts.size()),
				 static_cast<off_t>(call.offset));
		if (const auto wrong =
			    judge_(arena_.bytes(), target, call, answer < 0 ? -errno : answer))
			throw std::runtime_error(std::string(wrong->what()) + "; " + call.spec());
	}

	void read_file(const std::string &name, const std::string &options)
	{
		const Loop loop(options_.scratch, kLarge);
		const fs::path below = "/tmp/below";
		fs::create_directories(below);
		const Mount mount(loop.node(), below, {}, "ext2");
		const Volume volume(erofs::Image(below / name), below / name, options_.mount,
				    options);
		expect_alignment(volume, kLarge);
		read_all(volume, kLarge);
	}

	// Otherwise nobody could read such an image.
	static void read_buffered(const Volume &volume)
	{
		for (const auto &target : volume.files())
			expect_bytes(target.path, 0, target.truth, slurp(target.path));
	}

	// More pieces than a bio has room for, which then would end inside a block.
	static std::vector<Segment> scattered()
	{
		std::vector<Segment> all{{0, kPage}};
		for (size_t i = 1; i < 200; ++i)
			all.push_back({3 * i * kPage + kSector, kPage});
		return all;
	}

	// A bio has room for 256 pieces and so ends inside the last page.
	static std::vector<Segment> torn_page()
	{
		std::vector<Segment> all;
		for (size_t i = 0; i < 255; ++i)
			all.push_back({2 * i * kPage, kPage});
		all.push_back({510 * kPage, kSector});
		all.push_back({510 * kPage + kSector, kPage - kSector});
		return all;
	}

	// Each read is direct.
	void read_all(const Volume &volume, size_t unit)
	{
		const PathTrace trace("path != 0");
		PathTrace::forget();
		for (const auto &target : volume.files()) {
			check(target, {target.name, 0, scattered()});
			if (unit == kSector)
				check(target, {target.name, 0, torn_page()});
			for (const auto offset :
			     {size_t{0}, unit, 3 * unit, 7 * unit, target.size() / 2}) {
				const auto start = offset / unit * unit;
				for (const auto length : {unit, 3 * unit, 16 * unit, kMiB + unit,
							  target.size() + 2 * unit}) {
					const auto whole = length / unit * unit;
					check(target, {target.name, start, {{0, whole}}});
					check(target, {target.name, start, {{kSector, whole}}});
				}
				check(target, {target.name,
					       start,
					       {{kSector, unit}, {unit + 2 * kPage, 5 * unit}}});
			}
		}
		const auto taken = PathTrace::taken();
		if (!taken.empty())
			throw Error(options_.mount, 0, "direct reads only", *taken.begin());
	}

	Volume spread(const std::vector<fs::path> &devices) const
	{
		std::string options;
		for (const auto &device : devices)
			options += (options.empty() ? "device=" : ",device=") + device.string();
		return Volume(erofs::Image(options_.spread, options_.extra), options_.spread,
			      options_.mount, options);
	}

	static void expect_alignment(const Volume &volume, size_t offset)
	{
		const auto &target = volume.files().front();
		if (target.direct.offset != offset)
			throw Error(target.path.string(), 0,
				    "direct reads of " + std::to_string(offset) + " bytes",
				    std::to_string(target.direct.offset));
	}

	// One extent cannot be read.
	void fail_at(const erofs::Image &image, const std::string &name, size_t index)
	{
		const auto files = image.files();
		const auto entry = std::ranges::find(
			files, name, [](const auto &one) { return one.path.string(); });
		if (entry == files.end())
			throw Error(options_.plain, 0, "a file " + name, "none");
		const auto extent = image.extents(*entry).at(index);
		const auto sectors = device_size(options_.plain) / kSector;
		const auto first = extent.pa / kSector;
		std::vector<Sectors> parts{
			{first, 0},
			{kLarge / kSector, {}},
			{sectors - first - kLarge / kSector, first + kLarge / kSector}};
		const Linear device("erofs-dio-failing", options_.plain, parts);
		const Volume volume(image, device.node(), options_.mount);
		const auto &target = volume.file(name);
		const auto begin = extent.la / kPage * kPage;
		const auto end = std::min((extent.la + extent.llen + kPage - 1) / kPage * kPage,
					  target.aligned_size());
		for (const auto &[from, to] :
		     {std::pair{begin, begin + kPage},
		      {begin, end},
		      {begin - std::min(begin, 9 * kPage), end + 9 * kPage},
		      {size_t{0}, target.aligned_size()}})
			for (const auto &read : ways())
				expect_error(target, from, to - from, extent.la, read);
		const auto before = extent.la / kPage * kPage;
		if (before)
			check(target, {name, 0, {{0, before}}});
		if (end < target.size())
			check(target, {name, end, {{0, target.aligned_size() - end}}});
	}

	using Way = std::function<ssize_t(const Target &, size_t, std::span<std::byte>)>;

	static ssize_t queued(Queue &queue, const Target &target, size_t offset,
			      std::span<std::byte> memory)
	{
		const iovec part{memory.data(), memory.size()};
		queue.submit({0, target.fd, offset, {&part, 1}});
		return queue.wait().result;
	}

	static std::vector<Way> ways()
	{
		std::vector<Way> all{[](const Target &target, size_t offset, auto memory) {
			const auto got = ::pread(target.fd, memory.data(), memory.size(),
						 static_cast<off_t>(offset));
			return got < 0 ? -errno : got;
		}};
		if (Aio::available())
			all.push_back([](const Target &target, size_t offset, auto memory) {
				Aio queue(1);
				return queued(queue, target, offset, memory);
			});
		if (Uring::available())
			all.push_back([](const Target &target, size_t offset, auto memory) {
				Uring queue(1);
				return queued(queue, target, offset, memory);
			});
		return all;
	}

	// EIO, or what is in front of the extent at `bad`.
	void expect_error(const Target &target, size_t offset, size_t length, size_t bad,
			  const Way &read)
	{
		const auto memory = arena_.bytes().subspan(kGuard, length);
		const auto got = read(target, offset, memory);
		const auto want = target.expect(offset, length);
		const auto good = static_cast<ssize_t>(bad > offset ? bad - offset : 0);
		if (got != -EIO && (got <= 0 || got > good))
			throw Error(target.path.string(), static_cast<off_t>(offset),
				    "EIO or less than " + std::to_string(good) + " bytes",
				    got < 0 ? errno_text(static_cast<int>(-got))
					    : std::to_string(got) + " bytes");
		if (got > 0)
			expect_bytes(target.path, offset, want.first(static_cast<size_t>(got)),
				     memory);
		judge_.refill(arena_.bytes());
	}

	Options options_;
	Mapping arena_;
	std::vector<std::byte> pattern_;
	Judge judge_;
};

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Direct reads of EROFS images on devices of other kinds"};
	Options options;
	std::string name = "dio_devices";
	app.add_option("--plain", options.plain, "block device with an image with plain blocks")
		->required();
	app.add_option("--spread", options.spread, "one with an image that has extra devices")
		->required();
	app.add_option("--extra", options.extra, "these devices")->required();
	app.add_option("--fine", options.fine, "one with blocks of 512 bytes and an extra device")
		->required();
	app.add_option("--fine-extra", options.fine_extra, "this device")->required();
	app.add_option("--far", options.far, "one with a fragment behind 4 GiB and an extra device")
		->required();
	app.add_option("--far-extra", options.far_extra, "this device")->required();
	app.add_option(
		   "--scratch", options.scratch,
		   "one with an ext2 that has copies of --plain and, with smaller blocks, small")
		->required();
	app.add_option("--mount", options.mount, "where to mount images")->required();
	app.add_option("--name", name, "name of the suite in the KTAP output");
	CLI11_PARSE(app, argc, argv);
	try {
		if (!Linear::available())
			throw Error("/dev/mapper/control", 0, "device mapper", "none");
		Tester tester(options);
		return ktap::run(
			       name,
			       {{"large_logical_blocks",
				 [&] { return tester.large_logical_blocks(); }},
				{"smaller_blocks_than_below",
				 [&] { return tester.smaller_blocks_than_below(); }},
				{"file_read_directly", [&] { return tester.file_read_directly(); }},
				{"second_device_with_large_blocks",
				 [&] { return tester.second_device_with_large_blocks(); }},
				{"small_blocks_on_large_ones",
				 [&] { return tester.small_blocks_on_large_ones(); }},
				{"little_read_in_vain",
				 [&] { return tester.little_read_in_vain(); }},
				{"image_behind_something",
				 [&] { return tester.image_behind_something(); }},
				{"fragment_looked_up_by_others",
				 [&] { return tester.fragment_looked_up_by_others(); }},
				{"failing_device", [&] { return tester.failing_device(); }}})
			       ? 0
			       : 1;
	} catch (const std::exception &error) {
		ktap::line(std::string("Bail out! ") + error.what());
		return 1;
	}
}
