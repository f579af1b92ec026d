// SPDX-License-Identifier: GPL-2.0-only
#pragma once

#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <unistd.h>

namespace ktap
{

// One write per line: kernel messages share the console and must not cut a line in two.
inline void line(std::string text)
{
	text += '\n';
	for (std::string_view rest = text; !rest.empty();) {
		const auto done = ::write(STDOUT_FILENO, rest.data(), rest.size());
		if (done <= 0)
			return;
		rest.remove_prefix(static_cast<size_t>(done));
	}
}

struct Case {
	std::string_view name;
	// A reason to skip, or nothing; a failure is an exception.
	std::function<std::optional<std::string>()> body;
};

inline bool run(const std::string &suite, const std::vector<Case> &cases)
{
	line("KTAP version 1\n1..1\n    KTAP version 1\n    # Subtest: " + suite);
	line("    1.." + std::to_string(cases.size()));
	bool good = true;
	for (size_t i = 0; i < cases.size(); ++i) {
		std::string verdict = "ok ", skip;
		try {
			if (const auto reason = cases[i].body())
				skip = " # SKIP " + *reason;
		} catch (const std::exception &error) {
			line(std::string("    # ") + error.what());
			verdict = "not ok ";
			good = false;
		}
		line("    " + verdict + std::to_string(i + 1) + " " + std::string(cases[i].name) +
		     skip);
	}
	line((good ? "ok 1 " : "not ok 1 ") + suite);
	return good;
}

} // namespace ktap
