// SPDX-License-Identifier: GPL-2.0-only
// Reads that are submitted and completed later: Linux AIO and io_uring.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include <libaio.h>
#include <liburing.h>
#include <sys/uio.h>

#include "io.hpp"

struct Request {
	uint64_t id;
	int fd;
	size_t offset;
	std::span<const iovec> parts; // the kernel takes a copy while it is submitted
	int flags = 0;		      // RWF_*
	int buffer = -1;	      // io_uring: number of the registered buffer around parts[0]
	bool worker = false;	      // io_uring: not even tried by the caller itself
};

struct Completion {
	uint64_t id;
	ssize_t result; // bytes or -errno
};

// Memory of the requests has to outlive the queue, whose end waits for what is in flight.
class Queue
{
public:
	Queue() = default;
	Queue(const Queue &) = delete;
	Queue &operator=(const Queue &) = delete;
	virtual ~Queue() = default;

	void submit(std::span<const Request> requests)
	{
		do_submit(requests);
		in_flight_ += requests.size();
	}
	void submit(const Request &request) { submit(std::span(&request, 1)); }

	// Whatever is complete by now, without waiting.
	std::optional<Completion> poll() { return take(false); }
	Completion wait()
	{
		if (!in_flight_)
			throw Error("queue", 0, "a request in flight", "none");
		return *take(true);
	}
	size_t in_flight() const { return in_flight_; }
	// Of those that wait in calls which the caller must not wait in, if there are any.
	virtual void limit_workers(unsigned /*bounded*/) {}

protected:
	virtual void do_submit(std::span<const Request> requests) = 0;
	virtual std::optional<Completion> do_take(bool wait) = 0;

	static void check(std::string_view call, long answer)
	{
		if (answer < 0)
			throw Error(call, 0, "success", errno_text(static_cast<int>(-answer)));
	}

private:
	std::optional<Completion> take(bool wait)
	{
		const auto done = do_take(wait);
		in_flight_ -= done.has_value();
		return done;
	}

	size_t in_flight_ = 0;
};

class Aio : public Queue
{
public:
	explicit Aio(unsigned depth)
	{
		check("io_setup", ::io_queue_init(static_cast<int>(depth), &context_));
	}
	~Aio() override { ::io_queue_release(context_); }

	static bool available()
	{
		io_context_t context = nullptr;
		return !::io_queue_init(1, &context) && !::io_queue_release(context);
	}

protected:
	void do_submit(std::span<const Request> requests) override
	{
		std::vector<iocb> blocks(requests.size());
		std::vector<iocb *> list;
		for (size_t i = 0; i < requests.size(); ++i) {
			const auto &request = requests[i];
			::io_prep_preadv(&blocks[i], request.fd, request.parts.data(),
					 static_cast<int>(request.parts.size()),
					 static_cast<long long>(request.offset));
			blocks[i].aio_rw_flags = request.flags;
			blocks[i].data = reinterpret_cast<void *>(request.id);
			list.push_back(&blocks[i]);
		}
		for (size_t done = 0; done < list.size();) {
			const int count = ::io_submit(
				context_, static_cast<long>(list.size() - done), &list[done]);
			if (!count || count == -EAGAIN)
				check("io_submit", -EAGAIN);
			// about the first one: io_uring makes a completion of it
			if (count < 0)
				refused_.push_back({requests[done].id, count});
			done += static_cast<size_t>(std::max(count, 1));
		}
	}

	std::optional<Completion> do_take(bool wait) override
	{
		if (!refused_.empty()) {
			const auto done = refused_.back();
			refused_.pop_back();
			return done;
		}
		io_event event;
		timespec now{};
		int count;
		do
			count = ::io_getevents(context_, wait, 1, &event, wait ? nullptr : &now);
		while (count == -EINTR);
		check("io_getevents", count);
		if (!count)
			return {};
		return Completion{reinterpret_cast<uint64_t>(event.data),
				  static_cast<ssize_t>(event.res)};
	}

private:
	io_context_t context_ = nullptr;
	std::vector<Completion> refused_;
};

class Uring : public Queue
{
public:
	explicit Uring(unsigned depth, unsigned flags = 0)
	{
		check("io_uring_setup", ::io_uring_queue_init(depth, &ring_, flags));
	}
	~Uring() override
	{
		try {
			while (in_flight())
				wait();
		} catch (const Error &) {
			// the kernel cancels the rest
		}
		// what is left to the end of the ring is unpinned some time later
		::io_uring_unregister_buffers(&ring_);
		::io_uring_queue_exit(&ring_);
	}

	static bool available()
	{
		io_uring ring;
		if (::io_uring_queue_init(1, &ring, 0))
			return false;
		::io_uring_queue_exit(&ring);
		return true;
	}

	void limit_workers(unsigned bounded) override
	{
		std::array<unsigned, 2> limits{bounded, 0};
		check("io_uring_register",
		      ::io_uring_register_iowq_max_workers(&ring_, limits.data()));
	}
	// Pins the memory for as long as the ring exists.
	void register_buffers(std::span<const iovec> buffers)
	{
		check("io_uring_register",
		      ::io_uring_register_buffers(&ring_, buffers.data(),
						  static_cast<unsigned>(buffers.size())));
	}

protected:
	void do_submit(std::span<const Request> requests) override
	{
		for (const auto &request : requests) {
			auto *const entry = ::io_uring_get_sqe(&ring_);
			if (!entry)
				throw Error("io_uring_get_sqe", 0, "a free entry", "a full queue");
			prepare(entry, request);
			if (request.worker)
				entry->flags |= IOSQE_ASYNC;
			entry->user_data = request.id;
		}
		for (size_t done = 0; done < requests.size();) {
			const int count = ::io_uring_submit(&ring_);
			check("io_uring_enter", count ? count : -EAGAIN);
			done += static_cast<size_t>(count);
		}
	}

	std::optional<Completion> do_take(bool wait) override
	{
		io_uring_cqe *entry = nullptr;
		int code;
		do
			code = wait ? ::io_uring_wait_cqe(&ring_, &entry)
				    : ::io_uring_peek_cqe(&ring_, &entry);
		while (code == -EINTR);
		if (!wait && code == -EAGAIN)
			return {};
		check("io_uring_enter", code);
		const Completion done{entry->user_data, entry->res};
		::io_uring_cqe_seen(&ring_, entry);
		return done;
	}

private:
	static void prepare(io_uring_sqe *entry, const Request &request)
	{
		const auto count = static_cast<unsigned>(request.parts.size());
		if (count != 1) {
			if (request.buffer >= 0)
				throw Error("a registered buffer", 0, "one part",
					    std::to_string(count));
			::io_uring_prep_readv2(entry, request.fd, request.parts.data(), count,
					       request.offset, request.flags);
			return;
		}
		const auto base = request.parts[0].iov_base;
		const auto length = static_cast<unsigned>(request.parts[0].iov_len);
		if (request.buffer < 0)
			::io_uring_prep_read(entry, request.fd, base, length, request.offset);
		else
			::io_uring_prep_read_fixed(entry, request.fd, base, length, request.offset,
						   request.buffer);
		entry->rw_flags = request.flags;
	}

	io_uring ring_;
};
