// SPDX-License-Identifier: GPL-2.0-only
// A read as a line of text, and the judgement on what it has left in memory.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <sys/uio.h>

#include "target.hpp"

constexpr size_t kPage = 4096;
constexpr size_t kGuard = 2 * kPage;
constexpr size_t kMiB = 1 << 20;

struct Segment {
	size_t at; // distance from the first guard, which ends at a page boundary
	size_t len;

	bool operator==(const Segment &) const = default;
};

struct Call {
	std::string file;
	size_t offset;
	std::vector<Segment> segments;

	bool operator==(const Call &) const = default;
	size_t length() const
	{
		size_t sum = 0;
		for (const auto &segment : segments)
			sum += segment.len;
		return sum;
	}
	std::string spec() const
	{
		std::string text = file + ',' + std::to_string(offset);
		for (const auto &segment : segments)
			text += ',' + std::to_string(segment.at) + '+' +
				std::to_string(segment.len);
		return text;
	}
	std::vector<iovec> parts(std::span<std::byte> memory) const
	{
		std::vector<iovec> all;
		for (const auto &segment : segments)
			all.push_back({memory.data() + kGuard + segment.at, segment.len});
		return all;
	}
};

inline std::vector<std::string> split(const std::string &text, char separator)
{
	std::vector<std::string> fields;
	std::istringstream in(text);
	for (std::string field; std::getline(in, field, separator);)
		fields.push_back(field);
	return fields;
}

inline size_t number(std::string_view text)
{
	size_t value = 0;
	const auto [end, code] = std::from_chars(text.begin(), text.end(), value);
	if (code != std::errc() || end != text.end())
		throw Error("--replay", 0, "a number", text);
	return value;
}

inline Call parse_call(const std::string &spec, size_t memory)
{
	const auto fields = split(spec, ',');
	if (fields.size() < 3)
		throw Error("--replay", 0, "FILE,OFFSET,AT+LEN[,AT+LEN]...", spec);
	Call call{fields[0], number(fields[1]), {}};
	for (size_t i = 2; i < fields.size(); ++i) {
		const auto plus = fields[i].find('+');
		if (plus == std::string::npos)
			throw Error("--replay", 0, "AT+LEN", fields[i]);
		const Segment segment{number(fields[i].substr(0, plus)),
				      number(fields[i].substr(plus + 1))};
		const auto room = memory - 2 * kGuard;
		if (segment.at > room || segment.len > room - segment.at)
			throw Error("--replay", 0,
				    "segments within " + std::to_string(room) + " bytes",
				    fields[i]);
		call.segments.push_back(segment);
	}
	return call;
}

inline std::vector<std::byte> noise(size_t size, uint64_t seed)
{
	std::mt19937_64 source(seed);
	std::vector<std::byte> bytes(size);
	for (size_t i = 0; i < size; i += sizeof(uint64_t)) {
		const uint64_t word = source();
		std::memcpy(&bytes[i], &word, std::min(sizeof(word), size - i));
	}
	return bytes;
}

// Reads go into memory whose every byte is known: guards, gaps and unread rests are compared, too.
class Judge
{
public:
	// The memory holds the pattern, now and whenever a read begins.
	explicit Judge(std::span<const std::byte> pattern)
	    : pattern_(pattern),
	      space_(std::make_unique_for_overwrite<std::byte[]>(pattern.size())),
	      want_(space_.get(), pattern.size())
	{
	}

	void refill(std::span<std::byte> memory) const
	{
		std::copy_n(pattern_.begin(), memory.size(), memory.begin());
	}

	// The segments of a call with their guards.
	static std::pair<size_t, size_t> zone(const Call &call)
	{
		size_t begin = call.segments.empty() ? 0 : call.segments[0].at, end = begin;
		for (const auto &segment : call.segments) {
			begin = std::min(begin, segment.at);
			end = std::max(end, segment.at + segment.len);
		}
		return {begin, end + 2 * kGuard};
	}

	// What is wrong, if anything is; `answer` is a number of bytes or -errno.
	std::optional<Error> operator()(std::span<std::byte> memory, const Target &target,
					const Call &call, ssize_t answer)
	{
		const auto [begin, end] = zone(call);
		const auto data = target.expect(call.offset, call.length());
		std::optional<Error> wrong;
		if (end > ready_) {
			restore({ready_, end - ready_}, want_);
			ready_ = end;
		}
		if (answer == static_cast<ssize_t>(data.size())) {
			const auto got = memory.first(end).subspan(begin);
			const auto want = want_.first(end).subspan(begin);
			fill_expected(target, call, data, memory);
			if (std::memcmp(got.data(), want.data(), got.size()))
				wrong = explain(target, call, begin, got, want);
			for (const auto &part : written(target, call, data.size()))
				restore(part, want_);
		} else if (answer != -EINVAL || target.compressed || !misaligned(target, call)) {
			wrong = Error(target.path.string(), static_cast<off_t>(call.offset),
				      std::to_string(data.size()) + " bytes",
				      answer < 0 ? errno_text(static_cast<int>(-answer))
						 : std::to_string(answer));
		}
		if (wrong || answer < 0)
			restore({begin, end - begin}, memory);
		else
			for (const auto &part : written(target, call, data.size()))
				restore(part, memory);
		return wrong;
	}

	static bool misaligned(const Target &target, const Call &call)
	{
		auto bits = call.offset | call.length();
		for (const auto &segment : call.segments)
			bits |= segment.at | segment.len;
		return bits % target.block;
	}

private:
	// Where bytes may be that are not those of the pattern. An uncompressed file gets whole
	// blocks from the device: behind its end the last one may show.
	static std::vector<Segment> written(const Target &target, const Call &call, size_t length)
	{
		std::vector<Segment> parts;
		for (const auto &segment : call.segments) {
			const auto some = std::min(segment.len, length);
			parts.push_back(
				{kGuard + segment.at, target.compressed ? some : segment.len});
			length -= some;
		}
		return parts;
	}

	void restore(const Segment &part, std::span<std::byte> bytes) const
	{
		std::ranges::copy(pattern_.subspan(part.at, part.len),
				  bytes.subspan(part.at).begin());
	}

	void fill_expected(const Target &target, const Call &call, std::span<const std::byte> data,
			   std::span<const std::byte> memory)
	{
		for (const auto &part : written(target, call, data.size())) {
			const auto some = data.first(std::min(part.len, data.size()));
			const auto place = want_.subspan(part.at, part.len);
			std::ranges::copy(some, place.begin());
			std::ranges::copy(memory.subspan(part.at, part.len).subspan(some.size()),
					  place.subspan(some.size()).begin());
			data = data.subspan(some.size());
		}
	}

	static Error explain(const Target &target, const Call &call, size_t begin,
			     std::span<const std::byte> got, std::span<const std::byte> want)
	{
		const auto index =
			static_cast<size_t>(std::ranges::mismatch(got, want).in1 - got.begin());
		const auto byte = std::to_string(std::to_integer<int>(got[index]));
		const auto expected = "byte " + std::to_string(std::to_integer<int>(want[index]));
		size_t position = call.offset;
		for (const auto &segment : call.segments) {
			const auto start = kGuard + segment.at;
			if (begin + index >= start && begin + index < start + segment.len)
				return Error(target.path.string(),
					     static_cast<off_t>(position + begin + index - start),
					     expected, byte);
			position += segment.len;
		}
		return Error(target.path.string() + ": outside the buffer",
			     static_cast<off_t>(begin + index) - static_cast<off_t>(kGuard),
			     expected, byte);
	}

	std::span<const std::byte> pattern_;
	// The pattern, apart from the read that is judged. Most of it is never touched.
	std::unique_ptr<std::byte[]> space_;
	std::span<std::byte> want_;
	size_t ready_ = 0;
};
