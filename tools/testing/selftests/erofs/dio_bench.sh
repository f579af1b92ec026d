#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Measures direct and buffered reads of your own image on your own device: a phone, a server.
# Needs root, an EROFS that serves O_DIRECT on compressed files, and beside this script the static
# programs dio_bench and dio_report (make CXX=aarch64-linux-gnu-g++ for another machine).
set -eu

usage() {
	cat <<-END
	usage: dio_bench.sh [-p DEVICE] [-s DEVICE] [-r ROUNDS] [-o DIR] DEVICE FILE...
	DEVICE  block device with the image (losetup -r --show -f --direct-io=on IMAGE makes one)
	FILE    compressed files of the image, by their path in it: one for each of up to 8 threads
	-p      device with an uncompressed EROFS image of the same files
	-s      device with a squashfs of the same files
	-r      passes of each column (5)
	-o      where bench.rows, bench.json and bench.md go (.); an older one is shown beside it
	END
	exit 2
}

fail() {
	echo "dio_bench.sh: $*" >&2
	exit 1
}

plain='' squashfs='' rounds=5 out=.
while getopts hp:s:r:o: option; do
	case $option in
	p) plain=$OPTARG ;;
	s) squashfs=$OPTARG ;;
	r) rounds=$OPTARG ;;
	o) out=$OPTARG ;;
	*) usage ;;
	esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || usage
device=$1
shift

here=$(cd "$(dirname "$0")" && pwd)
for program in dio_bench dio_report; do
	[ -x "$here/$program" ] || fail "$here/$program: not there: make it first"
done
for disk in "$device" ${plain:+"$plain"} ${squashfs:+"$squashfs"}; do
	[ -b "$disk" ] || fail "$disk: no block device"
done
[ -w "$out/." ] || fail "$out: no directory to write the report to"
[ "$(id -u)" = 0 ] || fail "mounting and dropping caches needs root"

work=$(mktemp -d)
mount=$work/mnt
mkdir "$mount"
trap 'umount "$mount" 2>/dev/null || :; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

mount -t erofs -o ro "$device" "$mount"
# shells of phones count in 32 bits: MiB will do, and passes that last for seconds on a slow device
smallest=256 files=''
for file; do
	[ -f "$mount/$file" ] || fail "$file: no regular file of the image on $device"
	case $file in
	*[\"\\]*) fail "$file: a name with quotes or backslashes" ;;
	esac
	size=$(stat -c %s "$mount/$file" | awk '{ print int($1 / 1048576) }')
	[ "$smallest" -le "$size" ] || smallest=$size
	files="$files${files:+, }\"$file\""
done
umount "$mount"
[ "$smallest" -ge 1 ] || fail "the smallest file has less than a MiB, which is needed"
bytes=$((smallest << 20))

column() { # name mode device filesystem huge [KiB of read-ahead]
	printf '{"name": "%s", "mode": "%s", "device": "%s", "filesystem": "%s", "huge": %s, ' \
		"$1" "$2" "$3" "$4" "$5"
	printf '"read_ahead": %d, "files": [%s]}' "${6:-0}" "$files"
}

columns() {
	column buffered buffered "$device" erofs false
	printf ', '
	column far buffered "$device" erofs false 8192
	printf ', '
	column dropbehind dropbehind "$device" erofs false
	printf ', '
	column direct direct "$device" erofs false
	if [ -e /sys/kernel/mm/transparent_hugepage/enabled ] &&
		! grep -q '\[never\]' /sys/kernel/mm/transparent_hugepage/enabled; then
		printf ', '
		column thp direct "$device" erofs true
	fi
	if [ -n "$plain" ]; then
		printf ', '
		column plain direct "$plain" erofs false
	fi
	if [ -n "$squashfs" ]; then
		printf ', '
		column squashfs buffered "$squashfs" squashfs false
	fi
}

cell() { # pattern request threads depth
	# who reads what another one has brought into the page cache compares something else
	[ "$3" -le "$count" ] && [ "$bytes" -ge "$2" ] || return 0
	most=$bytes
	# random requests take their time each, and a thousand of them tell
	[ "$1" = sequential ] || [ $((bytes / $2)) -lt 1024 ] || most=$((1024 * $2))
	# a phone may not have that much for buffers
	[ $(($2 * $3 * ($4 ? $4 : 1))) -le $((128 << 20)) ] || return 0
	printf '%s{"parameters": {"vehicle": "%s", "pattern": "%s", "request": %d, ' \
		"$comma" "$(uname -nm | tr ' ' -)" "$1" "$2"
	printf '"threads": %d, "depth": %d, "memory": "ample", "data": "own"}, ' "$3" "$4"
	printf '"bytes": %d, "columns": [%s]}' "$most" "$(columns)"
	comma=', '
}

count=$# comma=''
{
	printf '['
	for pattern in sequential random; do
		for request in 4096 16384 65536 131072 1048576 8388608; do
			for threads in 1 2 8; do
				for depth in 0 8; do
					cell $pattern $request $threads $depth
				done
			done
		done
	done
	printf ']\n'
} >"$work/plan.json"

status=0
"$here/dio_bench" --plan "$work/plan.json" --mount "$mount" --rounds "$rounds" \
	>"$work/output" || status=$?
sed -n 's/^@json //p' "$work/output" >"$out/bench.rows"
if [ $status != 0 ]; then
	tail -n 1 "$out/bench.rows" >&2
	fail "dio_bench ended with status $status"
fi
before=$out/bench.json
[ -e "$before" ] || before=''
"$here/dio_report" "$out/bench.rows" --json "$work/bench.json" --markdown "$out/bench.md" \
	${before:+--before "$before"}
[ -z "$before" ] || mv "$before" "$out/bench-before.json"
cp "$work/bench.json" "$out/bench.json"
