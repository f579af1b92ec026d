// SPDX-License-Identifier: GPL-2.0-only
// Block devices between an image and the filesystem: device mapper and loop.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <linux/dm-ioctl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include "io.hpp"

inline uint64_t device_size(const std::filesystem::path &device)
{
	uint64_t bytes = 0;
	// BLKGETSIZE64, but <linux/fs.h> does not go with <sys/mount.h> of glibc 2.36
	if (::ioctl(Fd(device, O_RDONLY), _IOR(0x12, 114, size_t), &bytes))
		throw Error(device.string(), 0, "the size of a device", errno_text(errno));
	return bytes;
}

inline std::string device_number(dev_t device)
{
	return std::to_string(major(device)) + ':' + std::to_string(minor(device));
}

// So far, by anybody.
inline size_t bytes_read(const std::string &number)
{
	const auto path = "/sys/dev/block/" + number + "/stat";
	std::ifstream in(path);
	size_t reads = 0, merged = 0, sectors = 0;
	if (!(in >> reads >> merged >> sectors))
		throw Error(path, 0, "counts of a device", "none");
	return sectors * 512;
}

// Sectors of a device from `start` on; reads of those without one fail.
struct Sectors {
	uint64_t count;
	std::optional<uint64_t> start;
};

// All of another device or parts of it, read-only, which can be held up.
class Linear
{
public:
	static bool available() { return std::filesystem::exists(kControl); }

	Linear(std::string name, const std::filesystem::path &below)
	    : Linear(std::move(name), below, {{device_size(below) / 512, 0}})
	{
	}
	Linear(std::string name, const std::filesystem::path &below,
	       const std::vector<Sectors> &parts)
	    : name_(std::move(name)), below_(below), control_(kControl, O_RDWR)
	{
		Command create = command(0);
		send(DM_DEV_CREATE, create);
		const auto minor = (create.head.dev & 0xff) | ((create.head.dev >> 12) & 0xfff00);
		node_ = "/dev/dm-" + std::to_string(minor);
		try {
			load(below_, parts);
			resume();
		} catch (const Error &) {
			remove();
			throw;
		}
	}
	Linear(const Linear &) = delete;
	Linear &operator=(const Linear &) = delete;
	~Linear() { remove(); }

	const std::string &node() const { return node_; }

	// The filesystem is not frozen: its reads are what has to wait.
	void suspend()
	{
		Command suspend = command(DM_SUSPEND_FLAG | DM_SKIP_LOCKFS_FLAG);
		send(DM_DEV_SUSPEND, suspend);
	}
	void resume()
	{
		Command resume = command(0);
		send(DM_DEV_SUSPEND, resume);
	}
	// From now on all reads fail, or none does.
	void fail(bool all)
	{
		const Sectors whole{device_size(below_) / 512,
				    all ? std::nullopt : std::optional<uint64_t>(0)};
		// what cannot be loaded leaves it as it is
		load(below_, {whole});
		suspend();
		resume();
	}

private:
	static constexpr const char *kControl = "/dev/mapper/control";
	static constexpr size_t kParts = 16;
	struct Row {
		dm_target_spec target;
		std::array<char, 128> parameters;
	};
	struct Command {
		dm_ioctl head;
		std::array<Row, kParts> rows;
	};

	Command command(uint32_t flags) const
	{
		Command command{};
		command.head.version[0] = DM_VERSION_MAJOR;
		command.head.data_size = sizeof(command);
		command.head.data_start = offsetof(Command, rows);
		command.head.flags = flags;
		name_.copy(command.head.name, sizeof(command.head.name) - 1);
		return command;
	}
	void send(unsigned long code, Command &command) const
	{
		if (::ioctl(control_, code, &command))
			throw Error("device mapper: " + name_, 0, "success", errno_text(errno));
	}
	void load(const std::filesystem::path &below, const std::vector<Sectors> &parts) const
	{
		Command table = command(DM_READONLY_FLAG);
		uint64_t at = 0;
		for (const auto &part : parts) {
			auto &[target, parameters] = table.rows.at(table.head.target_count++);
			target.sector_start = at;
			target.length = part.count;
			target.next = sizeof(Row);
			at += part.count;
			std::strcpy(target.target_type, part.start ? "linear" : "error");
			if (part.start)
				std::snprintf(parameters.data(), parameters.size(), "%s %ju",
					      below.c_str(), uintmax_t{*part.start});
		}
		send(DM_TABLE_LOAD, table);
	}
	void remove() const
	{
		Command remove = command(0);
		::ioctl(control_, DM_DEV_REMOVE, &remove);
	}

	std::string name_, node_;
	std::filesystem::path below_;
	Fd control_;
};

// All reads of the device fail.
class Failing
{
public:
	explicit Failing(Linear &device) : device_(device) { device_.fail(true); }
	Failing(const Failing &) = delete;
	Failing &operator=(const Failing &) = delete;
	~Failing()
	{
		try {
			device_.fail(false);
		} catch (const Error &) {
			// what comes next fails, and says so
		}
	}

private:
	Linear &device_;
};

// Until resume(), no read of the device is served.  Whoever waits for one although he must not
// would hang: after a while, the device goes on by itself, and resume() tells.
class Suspended
{
public:
	explicit Suspended(Linear &device) : device_(device)
	{
		device_.suspend();
		watchdog_ = std::jthread([this](const std::stop_token &stop) { watch(stop); });
	}
	Suspended(const Suspended &) = delete;
	Suspended &operator=(const Suspended &) = delete;
	~Suspended()
	{
		try {
			finish();
		} catch (const Error &) {
			// the queues of the case will wait, and the guest has a time limit
		}
	}

	void resume()
	{
		finish();
		if (expired_)
			throw Error(device_.node(), 0, "calls that return while it is suspended",
				    "one that waited for it");
	}

private:
	void watch(const std::stop_token &stop)
	{
		std::unique_lock lock(mutex_);
		wake_.wait_for(lock, stop, std::chrono::seconds(20), [] { return false; });
		if (stop.stop_requested())
			return;
		expired_ = true;
		try {
			device_.resume();
		} catch (const Error &) {
			// whoever waits for it does so until the guest's time is over
		}
	}
	void finish()
	{
		if (!watchdog_.joinable())
			return;
		watchdog_.request_stop();
		watchdog_.join();
		if (!expired_)
			device_.resume();
	}

	Linear &device_;
	std::mutex mutex_;
	std::condition_variable_any wake_;
	bool expired_ = false; // written before the watchdog ends, read when it has ended
	std::jthread watchdog_;
};

// A file as a read-only block device that reads the file directly.
class Loop
{
public:
	// Without a size of logical blocks, they are those of the device below.
	explicit Loop(const std::filesystem::path &file, uint32_t block = 0)
	    : node_("/dev/loop" + std::to_string(free_number())), device_(node_, O_RDONLY)
	{
		const Fd backing(file, O_RDONLY);
		loop_config config{};
		config.fd = static_cast<uint32_t>(static_cast<int>(backing));
		config.block_size = block;
		config.info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_DIRECT_IO;
		if (::ioctl(device_, LOOP_CONFIGURE, &config))
			throw Error(file.string(), 0, "a loop device", errno_text(errno));
	}
	Loop(const Loop &) = delete;
	Loop &operator=(const Loop &) = delete;
	~Loop() { ::ioctl(device_, LOOP_CLR_FD); }

	const std::string &node() const { return node_; }
	// The kernel drops the flag silently where it cannot.
	bool direct() const
	{
		loop_info64 info{};
		if (::ioctl(device_, LOOP_GET_STATUS64, &info))
			throw Error(node_, 0, "LOOP_GET_STATUS64", errno_text(errno));
		return info.lo_flags & LO_FLAGS_DIRECT_IO;
	}

private:
	static int free_number()
	{
		const int number = ::ioctl(Fd("/dev/loop-control", O_RDWR), LOOP_CTL_GET_FREE);
		if (number < 0)
			throw Error("/dev/loop-control", 0, "a free loop device",
				    errno_text(errno));
		return number;
	}

	std::string node_;
	Fd device_;
};
