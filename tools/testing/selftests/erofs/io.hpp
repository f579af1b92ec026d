// SPDX-License-Identifier: GPL-2.0-only
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <exception>
#include <filesystem>
#include <functional>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

inline std::string errno_text(int code)
{
	// there are codes of the kernel that no program should ever see
	const char *const name = strerrorname_np(code);
	return (name ? name : std::to_string(code)) + " (" + std::strerror(code) + ")";
}

class Error : public std::runtime_error
{
public:
	Error(std::string_view file, off_t offset, std::string_view expected, std::string_view got)
	    : std::runtime_error(std::string(file) + ": offset " + std::to_string(offset) +
				 ": expected " + std::string(expected) + ", got " +
				 std::string(got))
	{
	}
};

class Fd
{
public:
	Fd(const std::filesystem::path &path, int flags)
	    : Fd(::open(path.c_str(), flags | O_CLOEXEC), path.string())
	{
	}
	Fd(int fd, std::string_view what) : fd_(fd)
	{
		if (fd_ < 0)
			throw Error(what, 0, "a file descriptor", errno_text(errno));
	}
	Fd(Fd &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
	Fd &operator=(Fd &&) = delete;
	~Fd() { close(); }
	void close()
	{
		if (fd_ >= 0)
			::close(std::exchange(fd_, -1));
	}
	operator int() const { return fd_; }

private:
	int fd_;
};

// The first exception of any of them is one of who joins them.
class Threads
{
public:
	void start(std::function<void()> body)
	{
		threads_.emplace_back([this, body = std::move(body)] {
			try {
				body();
			} catch (...) {
				const std::scoped_lock lock(mutex_);
				if (!failed_)
					failed_ = std::current_exception();
			}
		});
	}
	void join()
	{
		threads_.clear();
		if (failed_)
			std::rethrow_exception(failed_);
	}

private:
	std::mutex mutex_;
	std::exception_ptr failed_;
	std::vector<std::jthread> threads_; // end first
};

class Mapping
{
public:
	explicit Mapping(size_t size, int prot = PROT_READ | PROT_WRITE,
			 int flags = MAP_PRIVATE | MAP_ANONYMOUS, int fd = -1)
	    : bytes_(static_cast<std::byte *>(::mmap(nullptr, size, prot, flags, fd, 0)), size)
	{
		if (bytes_.data() == MAP_FAILED)
			throw Error("mmap", 0, std::to_string(size) + " bytes", errno_text(errno));
	}
	Mapping(const Mapping &) = delete;
	Mapping &operator=(const Mapping &) = delete;
	~Mapping() { ::munmap(bytes_.data(), bytes_.size()); }

	std::span<std::byte> bytes() const { return bytes_; }

private:
	std::span<std::byte> bytes_;
};

inline void write_text(const std::filesystem::path &path, std::string_view text)
{
	const Fd fd(path, O_WRONLY | O_TRUNC);
	if (::write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size()))
		throw Error(path.string(), 0, "to be set to " + std::string(text),
			    errno_text(errno));
}

inline size_t file_size(int fd)
{
	struct stat st;
	if (::fstat(fd, &st))
		throw Error("fstat", 0, "success", errno_text(errno));
	return static_cast<size_t>(st.st_size);
}

inline size_t cached_pages(int fd)
{
	const size_t size = file_size(fd);
	if (!size)
		return 0;
	const Mapping map(size, PROT_READ, MAP_SHARED, fd);
	const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
	std::vector<unsigned char> present((size + page - 1) / page);
	if (::mincore(map.bytes().data(), size, present.data()))
		throw Error("mincore", 0, "success", errno_text(errno));
	size_t count = 0;
	for (const auto flags : present)
		count += flags & 1;
	return count;
}

// What the kernel knows nothing of, so that there is nothing to be tested.
class Unknown : public Error
{
	using Error::Error;
};

// Unmounting waits for readahead in flight, which dropping caches would miss, and forgets the rest.
class Mount
{
public:
	Mount(const std::string &device, std::filesystem::path where,
	      const std::string &options = {}, const std::string &type = "erofs",
	      unsigned long flags = MS_RDONLY)
	    : where_(std::move(where))
	{
		if (!::mount(device.c_str(), where_.c_str(), type.c_str(), flags, options.c_str()))
			return;
		if (errno == EINVAL && !options.empty())
			throw Unknown("mount of " + device, 0, options, errno_text(errno));
		throw Error("mount of " + device, 0, "success", errno_text(errno));
	}
	Mount(const Mount &) = delete;
	Mount &operator=(const Mount &) = delete;
	~Mount()
	{
		if (mounted_)
			::umount2(where_.c_str(), 0);
	}

	// Whether it was no longer in use.
	bool unmount()
	{
		if (::umount2(where_.c_str(), 0)) {
			if (errno == EBUSY)
				return false;
			throw Error("umount of " + where_.string(), 0, "success",
				    errno_text(errno));
		}
		mounted_ = false;
		return true;
	}
	const std::filesystem::path &where() const { return where_; }

private:
	std::filesystem::path where_;
	bool mounted_ = true;
};
