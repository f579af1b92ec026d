// SPDX-License-Identifier: GPL-2.0-only
// Makes of what dio_bench measured a report: medians, spreads, ratios, and what must hold.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <optional>
#include <set>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "io.hpp"

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace
{

constexpr double mib = 1 << 20;

struct Summary {
	double median, low, high;
};

Summary summary(std::vector<double> values)
{
	std::ranges::sort(values);
	const auto half = values.size() / 2;
	const double median =
		values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
	return {median, values.front(), values.back()};
}

Json to_json(const Summary &value)
{
	return {{"median", value.median}, {"spread", {value.low, value.high}}};
}

// By the number of the round: a ratio is one of the same round.
using Rounds = std::map<unsigned, double>;
using Metrics = std::map<std::string, Rounds>;

struct Cell {
	Json parameters;
	// in the order in which they were measured first
	std::vector<std::string> names;
	std::map<std::string, Metrics> columns;

	const Rounds *find(const std::string &column, const std::string &metric) const
	{
		const auto found = columns.find(column);
		if (found == columns.end())
			return nullptr;
		const auto rounds = found->second.find(metric);
		return rounds == found->second.end() ? nullptr : &rounds->second;
	}

	std::optional<Summary> ratio(const std::string &above, const std::string &below,
				     const std::string &metric) const
	{
		const auto *const left = find(above, metric), *const right = find(below, metric);
		std::vector<double> values;
		if (left && right)
			for (const auto &[round, value] : *left)
				if (const auto other = right->find(round);
				    other != right->end() && other->second > 0)
					values.push_back(value / other->second);
		if (values.empty())
			return {};
		return summary(values);
	}

	std::optional<Summary> value(const std::string &column, const std::string &metric) const
	{
		const auto *const rounds = find(column, metric);
		if (!rounds)
			return {};
		std::vector<double> values;
		for (const auto &[round, one] : *rounds)
			values.push_back(one);
		return summary(values);
	}
};

class Results
{
public:
	void add(const fs::path &path)
	{
		std::ifstream in(path);
		if (!in)
			throw Error(path.string(), 0, "a file", errno_text(errno));
		size_t number = 0;
		for (std::string line; std::getline(in, line); ++number)
			try {
				add(Json::parse(line));
			} catch (const Json::exception &error) {
				throw Error(path.string() + ", line " + std::to_string(number + 1),
					    0, "a result", error.what());
			}
		if (!number)
			throw Error(path.string(), 0, "results", "none");
	}

	// What is executed beside the decoder is known only where the floor is.
	void derive()
	{
		for (auto &cell : cells_) {
			const auto floor = cell.value("floor", "instructions");
			for (auto &[name, metrics] : cell.columns)
				if (const auto counted = metrics.find("instructions");
				    floor && name != "floor" && counted != metrics.end())
					for (const auto &[round, value] : counted->second)
						metrics["beside"][round] = value - floor->median;
		}
	}

	const std::vector<Cell> &cells() const { return cells_; }
	const std::set<std::string> &kernels() const { return kernels_; }
	const std::set<std::string> &notes() const { return notes_; }

private:
	void add(const Json &row)
	{
		if (row.contains("kernel"))
			kernels_.insert("Linux " + row["kernel"].get<std::string>());
		if (row.contains("note"))
			notes_.insert(row["note"]);
		if (!row.contains("cell"))
			return;
		if (row.contains("dropped"))
			notes_.insert("dropbehind: by " + row["dropped"].get<std::string>());
		auto &cell = find(row.at("cell"));
		const std::string name = row.at("column");
		const unsigned round = row.at("round");
		const double bytes = row.at("bytes");
		if (!cell.columns.contains(name))
			cell.names.push_back(name);
		auto &metrics = cell.columns[name];
		for (const auto *const metric :
		     {"p50", "p99", "pages", "staging", "instructions", "decoder"})
			if (row.contains(metric))
				metrics[metric][round] = row[metric];
		if (row.contains("seconds"))
			metrics["mib_s"][round] = bytes / mib / row["seconds"].get<double>();
		if (row.contains("device_bytes"))
			metrics["device"][round] = row["device_bytes"].get<double>() / bytes;
	}

	Cell &find(const Json &parameters)
	{
		const auto found = std::ranges::find(cells_, parameters, &Cell::parameters);
		if (found != cells_.end())
			return *found;
		return cells_.emplace_back(Cell{parameters, {}, {}});
	}

	std::vector<Cell> cells_;
	std::set<std::string> kernels_, notes_;
};

const std::vector<std::pair<std::string, std::string>> pairs = {
	{"direct", "buffered"},	  {"thp", "buffered"},	 {"dropbehind", "buffered"},
	{"squashfs", "buffered"}, {"plain", "buffered"}, {"direct", "plain"},
	{"direct", "floor"},	  {"thp", "floor"},	 {"buffered", "floor"},
	{"direct", "dropbehind"}, {"thp", "direct"},	 {"far", "buffered"},
	{"direct", "far"},
};

Json record(const Cell &cell)
{
	Json columns = Json::object(), ratios = Json::object();
	for (const auto &name : cell.names)
		for (const auto &[metric, rounds] : cell.columns.at(name))
			if (const auto value = cell.value(name, metric))
				columns[name][metric] = to_json(*value);
	for (const auto &[above, below] : pairs)
		for (const auto *const metric : {"mib_s", "p50", "p99", "instructions", "beside"})
			if (const auto value = cell.ratio(above, below, metric))
				ratios[above + "/" + below][metric] = to_json(*value);
	return {{"cell", cell.parameters}, {"columns", columns}, {"ratios", ratios}};
}

// A row of the table of what must hold; each cell that it speaks of is judged.
struct Demand {
	std::string name;
	Json where;
	std::vector<size_t> pclusters;
	std::string above, below, metric;
	double bound;
	bool at_least;
};

std::vector<Demand> demands()
{
	const auto lz4 = [](const char *pattern, size_t request, unsigned threads,
			    const char *memory) {
		return Json{{"pattern", pattern}, {"request", request}, {"threads", threads},
			    {"depth", 0},	  {"memory", memory},	{"algorithm", "lz4"},
			    {"data", "mixed"}};
	};
	const std::vector<size_t> three = {4096, 16384, 65536}, two = {4096, 65536};
	const size_t k = 1024, m = k * k;
	auto noise = lz4("sequential", m, 1, "ample");
	noise["data"] = "incompressible";
	const auto one = lz4("sequential", m, 1, "ample"),
		   part = lz4("sequential", 64 * k, 1, "ample");
	const auto page = lz4("sequential", 4 * k, 1, "ample"),
		   any = lz4("random", 4 * k, 1, "ample");
	return {
		{"1 thread, 1 MiB", one, three, "direct", "buffered", "mib_s", 1.6, true},
		{"1 thread, 1 MiB, low memory", lz4("sequential", m, 1, "low"), three, "direct",
		 "buffered", "mib_s", 2.0, true},
		{"8 threads", lz4("sequential", m, 8, "ample"), three, "direct", "buffered",
		 "mib_s", 1.5, true},
		{"8 threads, low memory", lz4("sequential", m, 8, "low"), three, "direct",
		 "buffered", "mib_s", 1.8, true},
		{"64 KiB", part, three, "direct", "buffered", "mib_s", 1.0, true},
		{"4 KiB", page, three, "direct", "buffered", "mib_s", 0.8, true},
		{"random 4 KiB", any, three, "direct", "buffered", "mib_s", 1.1, true},
		{"random 4 KiB, p99", any, three, "direct", "buffered", "p99", 1.0, false},
		{"incompressible", noise, three, "direct", "plain", "mib_s", 0.95, true},
		{"1 MiB instructions", one, two, "direct", "floor", "instructions", 1.10, false},
		{"1 MiB instructions, THP", one, two, "thp", "floor", "instructions", 1.05, false},
		{"1 MiB instructions beside the decoder", one, two, "direct", "buffered", "beside",
		 0.3, false},
		{"64 KiB instructions",
		 part,
		 {4096},
		 "direct",
		 "buffered",
		 "instructions",
		 0.95,
		 false},
		{"64 KiB instructions",
		 part,
		 {65536},
		 "direct",
		 "buffered",
		 "instructions",
		 1.0,
		 false},
		{"THP buffers", one, three, "thp", "direct", "mib_s", 1.1, true},
		{"staging memory, MiB", Json::object(), {}, "direct", "", "staging", 4, false},
		{"staging memory, MiB", Json::object(), {}, "thp", "", "staging", 4, false},
	};
}

bool fits(const Demand &demand, const Json &parameters)
{
	for (const auto &[key, value] : demand.where.items())
		if (!parameters.contains(key) || parameters[key] != value)
			return false;
	return demand.pclusters.empty() ||
	       std::ranges::count(demand.pclusters, parameters.value("pcluster", size_t{0}));
}

std::string size_text(size_t size)
{
	return size >> 20 && !(size & ((1 << 20) - 1)) ? std::to_string(size >> 20) + "M"
						       : std::to_string(size >> 10) + "K";
}

std::string text(const Json &parameters)
{
	std::string all;
	for (const auto &[key, value] : parameters.items()) {
		if ((key == "pattern" && value == "sequential") ||
		    (key == "threads" && value == 1) || (key == "depth" && value == 0) ||
		    (key == "memory" && value == "ample") || (key == "data" && value == "mixed"))
			continue;
		all += all.empty() ? "" : " ";
		if (key == "threads" || key == "depth")
			all += key + " ";
		if (value.is_string())
			all += value.get<std::string>();
		else if (key == "request" || key == "pcluster")
			all += size_text(value);
		else
			all += value.dump();
	}
	return all;
}

Json judged(const Demand &demand, const std::string &cell, std::optional<double> value)
{
	Json row = {{"name", demand.name + ": " + demand.above +
				     (demand.below.empty() ? "" : " / " + demand.below)},
		    {"cell", cell},
		    {"value", nullptr},
		    {"bound", demand.bound},
		    {"at", demand.at_least ? "least" : "most"},
		    {"holds", nullptr}};
	if (value) {
		row["value"] = *value;
		row["holds"] = demand.at_least ? *value >= demand.bound : *value <= demand.bound;
	}
	return row;
}

Json judge(const std::vector<Cell> &cells)
{
	Json all = Json::array();
	// of an image of somebody's own, nothing is known that could be demanded of it
	const bool known = std::ranges::any_of(
		cells, [](const Cell &cell) { return cell.parameters.contains("algorithm"); });
	for (const auto &demand : demands()) {
		std::set<size_t> missing(demand.pclusters.begin(), demand.pclusters.end());
		bool any = false;
		for (const auto &cell : cells) {
			if (!fits(demand, cell.parameters))
				continue;
			if (const auto value = demand.below.empty()
						       ? cell.value(demand.above, demand.metric)
						       : cell.ratio(demand.above, demand.below,
								    demand.metric)) {
				all.push_back(judged(demand, text(cell.parameters),
						     demand.below.empty() ? value->high / mib
									  : value->median));
				missing.erase(cell.parameters.value("pcluster", size_t{0}));
				any = true;
			}
		}
		if (known && !any)
			all.push_back(judged(demand, "not measured", {}));
		for (const auto size : any ? missing : std::set<size_t>())
			all.push_back(judged(demand, size_text(size) + " not measured", {}));
	}
	return all;
}

std::string number(double value, int digits)
{
	std::array<char, 64> text;
	std::snprintf(text.data(), text.size(), "%.*f", digits, value);
	return text.data();
}

std::string joined(const std::set<std::string> &words)
{
	std::string all;
	for (const auto &word : words)
		all += (all.empty() ? "" : "; ") + word;
	return all;
}

// Of the previous report, to be shown beside this one.
class Previous
{
public:
	explicit Previous(const fs::path &path)
	{
		std::ifstream in(path);
		if (!in)
			return;
		const auto all = Json::parse(in, nullptr, false);
		if (all.is_discarded())
			return;
		kernels_ = " (" +
			   joined(all.value("kernels", std::set<std::string>{"kernel unknown"})) +
			   ")";
		for (const auto &item : all.value("cells", Json::array()))
			cells_[item.at("cell").dump()] = item;
		for (const auto &item : all.value("must_hold", Json::array()))
			demands_[key(item)] = item.at("value");
	}

	// A title for what was measured, maybe on another kernel.
	std::string title(const std::string &text) const { return text + kernels_; }

	std::string ratio(const Json &parameters, const std::string &which,
			  const std::string &metric) const
	{
		const auto found = cells_.find(parameters.dump());
		if (found == cells_.end())
			return "-";
		const auto &ratios = found->second.at("ratios");
		if (!ratios.contains(which) || !ratios[which].contains(metric))
			return "-";
		return number(ratios[which][metric].at("median"), 2);
	}

	std::string demand(const Json &item) const
	{
		const auto found = demands_.find(key(item));
		return found == demands_.end() || found->second.is_null()
			       ? "-"
			       : number(found->second, 3);
	}

private:
	static std::string key(const Json &item)
	{
		return item.at("name").get<std::string>() + item.at("cell").get<std::string>();
	}

	std::string kernels_;
	std::map<std::string, Json> cells_, demands_;
};

class Table
{
public:
	explicit Table(std::vector<std::string> titles) : columns_(titles.size())
	{
		row(std::move(titles));
		row(std::vector<std::string>(columns_, "---"));
	}

	void row(std::vector<std::string> cells)
	{
		for (const auto &cell : cells)
			text_ += "| " + cell + " ";
		text_ += "|\n";
	}

	const std::string &text() const { return text_; }

private:
	size_t columns_;
	std::string text_;
};

std::string demands_table(const Json &demands, const Previous &previous)
{
	if (demands.empty())
		return {};
	Table table({"must hold", "cell", "value", "bound", "", previous.title("before")});
	for (const auto &item : demands)
		table.row({item["name"], item["cell"],
			   item["value"].is_null() ? "-" : number(item["value"], 3),
			   "at " + item["at"].get<std::string>() + " " + number(item["bound"], 2),
			   item["holds"].is_null() ? "?"
			   : item["holds"]	   ? "holds"
						   : "FALLS SHORT",
			   previous.demand(item)});
	return table.text();
}

// One line a cell: what is absolute of the first column, ratios to it of the others.
std::string cells_table(const std::vector<Cell> &cells, const Previous &previous,
			const std::string &metric, int digits)
{
	const std::vector<std::string> names = {"far",	 "dropbehind", "direct", "thp",
						"plain", "squashfs",   "floor"};
	std::vector<std::string> titles = {"cell", "buffered"};
	for (const auto &name : names)
		titles.push_back(name + "/buffered");
	titles.insert(titles.end(), {previous.title("direct: before"), "direct: low..high",
				     "p99 direct/buffered", "pages left", "device bytes a byte"});
	Table table(titles);
	bool any = false;
	for (const auto &cell : cells) {
		const auto first = cell.value("buffered", metric);
		if (!first)
			continue;
		any = true;
		std::vector<std::string> row = {text(cell.parameters),
						number(first->median, digits)};
		for (const auto &name : names) {
			const auto value = cell.ratio(name, "buffered", metric);
			row.push_back(value ? number(value->median, 2) : "-");
		}
		row.push_back(previous.ratio(cell.parameters, "direct/buffered", metric));
		const auto direct = cell.ratio("direct", "buffered", metric);
		row.push_back(direct ? number(direct->low, 2) + ".." + number(direct->high, 2)
				     : "-");
		const auto late = cell.ratio("direct", "buffered", "p99");
		row.push_back(late ? number(late->median, 2) : "-");
		for (const auto &[what, precision] :
		     {std::pair("pages", 0), std::pair("device", 2)}) {
			const auto value = cell.value("direct", what);
			row.push_back(value ? number(value->high, precision) : "-");
		}
		table.row(row);
	}
	return any ? table.text() : "";
}

void write(const fs::path &path, const std::string &text)
{
	std::ofstream out(path);
	if (!(out << text << std::flush))
		throw Error(path.string(), 0, "a successful write", errno_text(errno));
}

} // namespace

int main(int argc, char **argv)
{
	CLI::App app{"Makes a report of what dio_bench measured"};
	std::vector<fs::path> inputs;
	fs::path json, markdown, before;
	app.add_option("results", inputs, "files of results, one a line")->required();
	app.add_option("--json", json, "where to write all figures")->required();
	app.add_option("--markdown", markdown, "where to write the tables")->required();
	app.add_option("--before", before, "an older --json to show beside it");
	CLI11_PARSE(app, argc, argv);
	try {
		Results results;
		for (const auto &path : inputs)
			results.add(path);
		results.derive();
		const Previous previous(before);
		Json records = Json::array();
		for (const auto &cell : results.cells())
			records.push_back(record(cell));
		const auto must_hold = judge(results.cells());
		std::string tables = joined(results.kernels()) + "\n\n";
		for (const auto &note : results.notes())
			tables += note + "\n\n";
		tables += demands_table(must_hold, previous);
		if (const auto speed = cells_table(results.cells(), previous, "mib_s", 0);
		    !speed.empty())
			tables +=
				"\nThroughput: buffered in MiB/s, ratios above 1 are faster.\n\n" +
				speed;
		if (const auto cost = cells_table(results.cells(), previous, "instructions", 0);
		    !cost.empty())
			tables += "\nInstructions per MiB: ratios below 1 are cheaper.\n\n" + cost;
		write(json, Json{{"kernels", results.kernels()},
				 {"notes", results.notes()},
				 {"cells", records},
				 {"must_hold", must_hold}}
					    .dump(1) +
				    "\n");
		write(markdown, tables);
		std::cout << tables;
		return 0;
	} catch (const std::exception &error) {
		std::cerr << "dio_report: " << error.what() << "\n";
		return 1;
	}
}
