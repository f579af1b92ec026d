// SPDX-License-Identifier: GPL-2.0-only
// QEMU plugin: counts the instructions that a guest executes between two marks, by symbol.
//
// A mark is an instruction of arm64 that does nothing: movz xzr, #0xe201 begins a region and
// #0xe202 ends it. Arguments: map=FILE, lines of nm; out=FILE, a line of JSON for each region. Of
// blocks of instructions that an exception leaves early all are counted, which matters little.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>

extern "C" {
#include <qemu-plugin.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;
}

namespace
{

constexpr uint32_t mark_mask = 0xffe0001f, mark_bits = 0xd280001f;
constexpr uint32_t mark_begin = 0xe201, mark_end = 0xe202;

struct Runs {
	uint64_t now = 0, before = 0;
};

class Counter
{
public:
	bool read_map(const std::string &path)
	{
		std::ifstream in(path);
		for (std::string line; std::getline(in, line);) {
			std::istringstream words(line);
			uint64_t address;
			char kind;
			std::string name;
			if (words >> std::hex >> address >> kind >> name &&
			    std::strchr("tTwW", kind))
				symbols_.emplace(address, name);
		}
		return !symbols_.empty();
	}

	bool write_to(const std::string &path)
	{
		out_.open(path);
		return out_.is_open();
	}

	uint64_t *runs(uint64_t address, size_t length)
	{
		const std::lock_guard guard(lock_);
		return &blocks_[{address, length}].now;
	}

	void mark(uint32_t what)
	{
		const std::lock_guard guard(lock_);
		if (what == mark_end)
			report();
		for (auto &[block, runs] : blocks_)
			runs.before = runs.now;
	}

private:
	static bool in_kernel(uint64_t address) { return address >> 63; }

	std::string symbol(uint64_t address) const
	{
		const auto next = symbols_.upper_bound(address);
		if (next == symbols_.begin() ||
		    in_kernel(std::prev(next)->first) != in_kernel(address))
			return "?";
		return std::prev(next)->second;
	}

	void report()
	{
		uint64_t total[2] = {};
		std::map<std::string, uint64_t> sums[2];
		for (const auto &[block, runs] : blocks_) {
			const auto [address, length] = block;
			const auto count = (runs.now - runs.before) * length;
			if (!count)
				continue;
			const bool kernel = in_kernel(address);
			total[kernel] += count;
			sums[kernel][symbol(address)] += count;
		}
		out_ << "{";
		for (const bool kernel : {false, true}) {
			out_ << (kernel ? ", \"kernel\": " : "\"user\": ") << total[kernel]
			     << (kernel ? ", \"kernel_symbols\": {" : ", \"user_symbols\": {");
			const char *comma = "";
			for (const auto &[name, count] : sums[kernel]) {
				out_ << comma << '"' << name << "\": " << count;
				comma = ", ";
			}
			out_ << "}";
		}
		out_ << "}" << std::endl;
	}

	std::mutex lock_;
	std::map<uint64_t, std::string> symbols_;
	// by address and length; translated code adds to them, so that they must never move
	std::map<std::pair<uint64_t, size_t>, Runs> blocks_;
	std::ofstream out_;
};

Counter counter;

void on_mark(unsigned, void *what)
{
	counter.mark(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(what)));
}

void on_translation(qemu_plugin_id_t, qemu_plugin_tb *block)
{
	const auto address = qemu_plugin_tb_vaddr(block);
	const auto length = qemu_plugin_tb_n_insns(block);
	qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64,
						 counter.runs(address, length), 1);
	if (address >> 63)
		return; // programs set marks, the kernel does not
	for (size_t i = 0; i < length; ++i) {
		auto *const insn = qemu_plugin_tb_get_insn(block, i);
		uint32_t word;
		std::memcpy(&word, qemu_plugin_insn_data(insn), sizeof(word));
		const auto what = (word & ~mark_mask) >> 5;
		if ((word & mark_mask) == mark_bits && (what == mark_begin || what == mark_end))
			qemu_plugin_register_vcpu_insn_exec_cb(
				insn, on_mark, QEMU_PLUGIN_CB_NO_REGS,
				reinterpret_cast<void *>(uintptr_t{what}));
	}
}

bool apply(std::string_view argument)
{
	const auto value =
		std::string(argument.substr(std::min(argument.find('=') + 1, argument.size())));
	if (argument.starts_with("map="))
		return counter.read_map(value);
	return argument.starts_with("out=") && counter.write_to(value);
}

} // namespace

extern "C" QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info,
						      int argc, char **argv)
{
	if (std::strcmp(info->target_name, "aarch64") || info->system.smp_vcpus != 1) {
		std::fprintf(stderr, "count_insns: needs aarch64 and one CPU\n");
		return 1;
	}
	for (int i = 0; i < argc; ++i) {
		if (!apply(argv[i])) {
			std::fprintf(stderr, "count_insns: %s: cannot be used\n", argv[i]);
			return 1;
		}
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	return 0;
}
