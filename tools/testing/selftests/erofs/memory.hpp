// SPDX-License-Identifier: GPL-2.0-only
// Kinds of memory that a direct read may find as its destination.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "io.hpp"

// Not a failure: this machine does not have it. The text is the reason.
class Unavailable : public std::runtime_error
{
	using std::runtime_error::runtime_error;
};

// A setting of the kernel, put back at the end. What cannot be set shows when it is used.
class Setting
{
public:
	Setting(std::filesystem::path path, const std::string &value) : path_(std::move(path))
	{
		std::ifstream in(path_);
		std::getline(in, old_);
		// of several choices the present one is in brackets
		if (const auto open = old_.find('['); open != old_.npos)
			old_ = old_.substr(open + 1, old_.find(']') - open - 1);
		// .. and what is behind a value explains it
		old_ = old_.substr(0, old_.find(' '));
		std::ofstream(path_) << value;
	}
	Setting(const Setting &) = delete;
	Setting &operator=(const Setting &) = delete;
	~Setting()
	{
		if (!old_.empty())
			std::ofstream(path_) << old_;
	}

private:
	std::filesystem::path path_;
	std::string old_;
};

// Lets the kernel hand out large folios, and huge pages on demand.
class LargeFolios
{
public:
	static constexpr std::string_view kTop = "/sys/kernel/mm/transparent_hugepage/";
	static constexpr std::string_view kSmall = "hugepages-64kB/enabled";
	static constexpr std::string_view kHuge = "/proc/sys/vm/nr_overcommit_hugepages";

private:
	Setting whole_{std::string(kTop) + "enabled", "madvise"};
	Setting small_{std::string(kTop) + std::string(kSmall), "madvise"};
	Setting huge_{kHuge, "64"};
};

// One word per page: where it is. Only root gets to know frame numbers.
inline std::vector<uint64_t> pagemap(std::span<const std::byte> memory)
{
	const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
	const Fd fd("/proc/self/pagemap", O_RDONLY);
	std::vector<uint64_t> words(memory.size() / page);
	const auto want = words.size() * sizeof(words[0]);
	const auto at = reinterpret_cast<uintptr_t>(memory.data()) / page * sizeof(words[0]);
	if (::pread(fd, words.data(), want, static_cast<off_t>(at)) != static_cast<ssize_t>(want))
		throw Error("/proc/self/pagemap", static_cast<off_t>(at), "a word per page",
			    errno_text(errno));
	return words;
}

inline size_t swapped_pages(std::span<const std::byte> memory)
{
	constexpr uint64_t kSwapped = 1ull << 62;
	size_t count = 0;
	for (const auto word : pagemap(memory))
		count += (word & kSwapped) != 0;
	return count;
}

// Whether each aligned unit of the memory is one aligned run of physical pages.
inline bool in_folios(std::span<const std::byte> memory, size_t unit)
{
	constexpr uint64_t kPresent = 1ull << 63, kFrame = (1ull << 55) - 1;
	const auto pages = unit / static_cast<size_t>(::sysconf(_SC_PAGESIZE));
	const auto words = pagemap(memory);
	for (size_t i = 0; i < words.size(); ++i) {
		const auto frame = words[i] & kFrame;
		if (!(words[i] & kPresent) || !frame)
			return false;
		if (i % pages ? frame != (words[i - 1] & kFrame) + 1 : frame % pages != 0)
			return false;
	}
	return true;
}

class Memory
{
public:
	Memory(size_t size, int flags, std::optional<Fd> file = {}, size_t align = 1)
	    : file_(std::move(file)),
	      map_(std::make_unique<Mapping>(size + align - 1, PROT_READ | PROT_WRITE, flags,
					     file_ ? static_cast<int>(*file_) : -1))
	{
		const auto start = reinterpret_cast<uintptr_t>(map_->bytes().data());
		bytes_ = map_->bytes().subspan(-start & (align - 1), size);
	}

	std::span<std::byte> bytes() const { return bytes_; }
	// Pages that were in the state that is special about this kind when a read began.
	size_t prepared() const { return prepared_; }

	// Bring whole pages into that state; their content stays.
	void prepare(size_t begin, size_t end)
	{
		if (!advice_)
			return;
		const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
		begin = begin / page * page;
		end = std::min((end + page - 1) / page * page, bytes_.size());
		const auto part = bytes_.subspan(begin, end - begin);
		if (::madvise(part.data(), part.size(), advice_))
			throw Error("madvise " + std::to_string(advice_), 0, "success",
				    errno_text(errno));
		prepared_ += advice_ == MADV_PAGEOUT ? swapped_pages(part) : part.size() / page;
		// what is only read is in memory and in swap
		for (size_t at = 0; advice_ == MADV_PAGEOUT && at < part.size(); at += 2 * page)
			static_cast<void>(*const_cast<const volatile std::byte *>(&part[at]));
	}

	Memory advised(int advice) &&
	{
		if (::madvise(bytes_.data(), bytes_.size(), advice) && errno != EINVAL)
			throw Error("madvise " + std::to_string(advice), 0, "success",
				    errno_text(errno));
		return std::move(*this);
	}
	Memory filled(std::span<const std::byte> content) &&
	{
		std::copy_n(content.begin(), bytes_.size(), bytes_.begin());
		return std::move(*this);
	}
	Memory prepared_by(int advice) &&
	{
		advice_ = advice;
		return std::move(*this);
	}

private:
	std::optional<Fd> file_;
	std::unique_ptr<Mapping> map_;
	std::span<std::byte> bytes_;
	int advice_ = 0;
	size_t prepared_ = 0;
};

struct MemorySetup {
	std::span<const std::byte> content; // of all memory, at first
	std::filesystem::path directory;    // of a filesystem with private data in its folios
};

struct MemoryKind {
	std::string_view name;
	size_t size;
	// A ring may keep it pinned, and yet what it reads into is what is mapped.
	bool registrable;
	Memory (*make)(size_t size, const MemorySetup &setup);
};

namespace memory
{

constexpr int kAnonymous = MAP_PRIVATE | MAP_ANONYMOUS;

inline size_t setting(const std::string &path, const std::string &without)
{
	std::ifstream in(path);
	size_t value = 0;
	if (!(in >> value) || !value)
		throw Unavailable(without);
	return value;
}

inline Memory of_folios(Memory made, size_t unit)
{
	if (!in_folios(made.bytes(), unit))
		throw Unavailable("the kernel did not hand out folios of " + std::to_string(unit) +
				  " bytes");
	return made;
}

inline Memory order0(size_t size, const MemorySetup &setup)
{
	return Memory(size, kAnonymous).advised(MADV_NOHUGEPAGE).filled(setup.content);
}

inline Memory thp(size_t size, const MemorySetup &setup)
{
	const auto unit = setting(std::string(LargeFolios::kTop) + "hpage_pmd_size",
				  "the kernel has no transparent huge pages");
	if (size % unit)
		throw Unavailable("huge pages of " + std::to_string(unit) + " bytes are too large");
	return of_folios(
		Memory(size, kAnonymous, {}, unit).advised(MADV_HUGEPAGE).filled(setup.content),
		unit);
}

// Too small for a huge page, so that the next size is taken.
inline Memory mthp(size_t size, const MemorySetup &setup)
{
	constexpr size_t kUnit = 65536;
	if (!std::filesystem::exists(std::string(LargeFolios::kTop) +
				     std::string(LargeFolios::kSmall)))
		throw Unavailable("the kernel has no anonymous folios of 64 KiB");
	return of_folios(
		Memory(size, kAnonymous, {}, kUnit).advised(MADV_HUGEPAGE).filled(setup.content),
		kUnit);
}

inline size_t huge_page(size_t size)
{
	setting(std::string(LargeFolios::kHuge), "the kernel has no huge pages");
	std::ifstream in("/proc/meminfo");
	for (std::string word; in >> word;) {
		size_t kib = 0;
		if (word == "Hugepagesize:" && in >> kib) {
			if (size % (kib * 1024))
				throw Unavailable("huge pages of " + std::to_string(kib) +
						  " KiB are too large");
			return kib * 1024;
		}
	}
	throw Unavailable("the kernel has no huge pages");
}

inline Memory huge(size_t size, int flags, std::optional<Fd> file, const MemorySetup &setup)
{
	const auto unit = huge_page(size);
	try {
		return of_folios(Memory(size, flags, std::move(file)).filled(setup.content), unit);
	} catch (const Error &error) {
		throw Unavailable(std::string("no memory for huge pages: ") + error.what());
	}
}

inline Memory hugetlb(size_t size, const MemorySetup &setup)
{
	return huge(size, kAnonymous | MAP_HUGETLB, {}, setup);
}

inline Memory shmem(size_t size, const MemorySetup &setup)
{
	return Memory(size, MAP_SHARED | MAP_ANONYMOUS).filled(setup.content);
}

inline Fd memory_file(size_t size, unsigned flags)
{
	Fd fd(::memfd_create("destination", flags | MFD_CLOEXEC), "memfd");
	if (::ftruncate(fd, static_cast<off_t>(size)))
		throw Error("memfd", static_cast<off_t>(size), "ftruncate", errno_text(errno));
	return fd;
}

inline Memory memfd(size_t size, const MemorySetup &setup)
{
	return Memory(size, MAP_SHARED, memory_file(size, 0)).filled(setup.content);
}

inline Memory memfd_huge(size_t size, const MemorySetup &setup)
{
	huge_page(size);
	return huge(size, MAP_SHARED, memory_file(size, MFD_HUGETLB), setup);
}

inline void write_content(const Fd &fd, std::string_view what, size_t size,
			  std::span<const std::byte> content)
{
	if (::pwrite(fd, content.data(), size, 0) != static_cast<ssize_t>(size))
		throw Error(what, 0, std::to_string(size) + " bytes written", errno_text(errno));
}

// Written, not just mapped: its folios get their private data that way.
inline Memory private_data(size_t size, const MemorySetup &setup)
{
	if (setup.directory.empty())
		throw Unavailable("needs --private");
	auto path = (setup.directory / "exercise-XXXXXX").string();
	Fd fd(::mkstemp(path.data()), path);
	::unlink(path.c_str());
	write_content(fd, path, size, setup.content);
	return Memory(size, MAP_SHARED, std::move(fd));
}

// Each read finds pages that are still those of the file, and has to copy them first.
inline Memory private_mapping(size_t size, const MemorySetup &setup)
{
	auto fd = memory_file(size, 0);
	write_content(fd, "memfd", size, setup.content);
	return Memory(size, MAP_PRIVATE, std::move(fd)).prepared_by(MADV_DONTNEED);
}

// Each read finds its pages in swap, half of them in memory as well.
inline Memory swapped(size_t size, const MemorySetup &setup)
{
	std::ifstream in("/proc/swaps");
	std::string title, first;
	if (!std::getline(in, title) || !std::getline(in, first))
		throw Unavailable("no swap is on");
	auto made = Memory(size, kAnonymous)
			    .advised(MADV_NOHUGEPAGE)
			    .filled(setup.content)
			    .prepared_by(MADV_PAGEOUT);
	made.prepare(0, size);
	if (!made.prepared())
		throw Unavailable("the kernel did not swap anything out");
	return made;
}

} // namespace memory

// The first one is the simplest. Expensive ones are small.
inline constexpr std::array kMemoryKinds{
	MemoryKind{"anonymous", 4 << 20, true, memory::order0},
	MemoryKind{"thp", 4 << 20, true, memory::thp},
	MemoryKind{"mthp", 1 << 20, true, memory::mthp},
	MemoryKind{"hugetlb", 4 << 20, true, memory::hugetlb},
	MemoryKind{"shmem", 4 << 20, true, memory::shmem},
	MemoryKind{"memfd", 4 << 20, true, memory::memfd},
	MemoryKind{"memfd-huge", 4 << 20, true, memory::memfd_huge},
	MemoryKind{"private-data", 256 << 10, false, memory::private_data},
	MemoryKind{"private-mapping", 256 << 10, false, memory::private_mapping},
	MemoryKind{"swapped", 256 << 10, false, memory::swapped},
};
