// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit tests of the geometry of direct reads, included by zdio.c.  All
 * expected values have been worked out by hand.
 */
#include <kunit/test.h>

#define P	((unsigned int)PAGE_SIZE)

static void zdio_cut_test(struct kunit *test)
{
	static const struct {
		loff_t pos, la, lend;
		unsigned int bs;
		loff_t end;
	} c[] = {
		/* at the start of an extent, if that is a block boundary */
		{ 0, 8192, 12288, 4096, 8192 },
		/* otherwise behind its first block: any byte of the block */
		{ 0, 8193, 12288, 4096, 12288 },
		{ 0, 8191, 12288, 4096, 8192 },
		{ 0, 8193, 12288, 512, 8704 },
		/* the extent starts one byte behind the window's start */
		{ 8192, 8193, 1 << 21, 4096, 12288 },
		/* it starts with the window or before: take all of it */
		{ 8192, 8192, 1 << 21, 4096, 1 << 21 },
		{ 8192, 1, (1 << 21) + 1, 4096, (1 << 21) + 4096 },
		{ 512, 0, 4097, 4096, 8192 },
		/* inconsistent indexes: the extent doesn't cover anything */
		{ 65536, 0, 4096, 4096, 65536 + SZ_1M },
		{ 65536, 65536, 65536, 4096, 65536 + SZ_1M },
		/* 32 bits don't suffice */
		{ 5LL << 32, (5LL << 32) + 1, 6LL << 32, 4096,
		  (5LL << 32) + 4096 },
	};
	int i;

	for (i = 0; i < ARRAY_SIZE(c); ++i)
		KUNIT_EXPECT_EQ_MSG(test, c[i].end,
				    z_erofs_dio_cut(c[i].pos, c[i].la,
						    c[i].lend, c[i].bs),
				    "case %d", i);
}

/* Five real pages, so that bytes can be checked as well */
struct zdio_pages {
	struct page *page[5];
};

static int zdio_init(struct kunit *test)
{
	struct zdio_pages *p = kunit_kzalloc(test, sizeof(*p), GFP_KERNEL);
	int i;

	KUNIT_ASSERT_NOT_NULL(test, p);
	test->priv = p;
	for (i = 0; i < ARRAY_SIZE(p->page); ++i) {
		p->page[i] = alloc_page(GFP_KERNEL);
		KUNIT_ASSERT_NOT_NULL(test, p->page[i]);
		memset(page_address(p->page[i]), 0xa5, PAGE_SIZE);
	}
	return 0;
}

static void zdio_exit(struct kunit *test)
{
	struct zdio_pages *p = test->priv;
	int i;

	for (i = 0; p && i < ARRAY_SIZE(p->page) && p->page[i]; ++i)
		__free_page(p->page[i]);
}

struct zdio_piece {
	unsigned int page, ofs, len;
};

/* Build the destination of a file range that starts at @pos */
static void zdio_dest(struct kunit *test, struct z_erofs_dio_dest *d,
		      loff_t pos, const struct zdio_piece *piece, int n)
{
	struct zdio_pages *p = test->priv;
	struct bio_vec bv;

	*d = (struct z_erofs_dio_dest) {
		.pages = kunit_kcalloc(test, 16, sizeof(*d->pages), GFP_KERNEL),
		.segs = kunit_kcalloc(test, 16, sizeof(*d->segs), GFP_KERNEL),
	};
	KUNIT_ASSERT_NOT_NULL(test, d->pages);
	KUNIT_ASSERT_NOT_NULL(test, d->segs);
	for (; n--; pos += piece++->len) {
		bvec_set_page(&bv, p->page[piece->page], piece->len,
			      piece->ofs);
		z_erofs_dio_add(d, &bv, pos);
	}
}

#define ZDIO_DEST(test, d, pos, ...) do {				\
	const struct zdio_piece __p[] = { __VA_ARGS__ };		\
									\
	zdio_dest(test, d, pos, __p, ARRAY_SIZE(__p));			\
} while (0)

static void zdio_expect_seg(struct kunit *test, struct z_erofs_dio_dest *d,
			    int i, loff_t pos, unsigned int len,
			    unsigned int base)
{
	KUNIT_ASSERT_LT(test, i, d->nr_segs);
	KUNIT_EXPECT_EQ(test, pos, d->segs[i].pos);
	KUNIT_EXPECT_EQ(test, len, d->segs[i].len);
	KUNIT_EXPECT_EQ(test, base, d->segs[i].base);
}

static void zdio_add_test(struct kunit *test)
{
	struct z_erofs_dio_dest d;

	/* pages in any order make one segment */
	ZDIO_DEST(test, &d, 8192, {3, 0, P}, {1, 0, P}, {2, 0, 512});
	KUNIT_EXPECT_EQ(test, 1, d.nr_segs);
	KUNIT_EXPECT_EQ(test, 3, d.nr_pages);
	zdio_expect_seg(test, &d, 0, 8192, 2 * P + 512, 0);

	/* it may start and end anywhere in a page */
	ZDIO_DEST(test, &d, 0, {0, P - 4, 4}, {1, 0, P}, {2, 0, 4});
	KUNIT_EXPECT_EQ(test, 1, d.nr_segs);
	zdio_expect_seg(test, &d, 0, 0, P + 8, P - 4);

	/* pieces which go on in the same page */
	ZDIO_DEST(test, &d, 0, {0, 4, 8}, {0, 12, P - 12}, {1, 0, 4});
	KUNIT_EXPECT_EQ(test, 1, d.nr_segs);
	KUNIT_EXPECT_EQ(test, 2, d.nr_pages);
	zdio_expect_seg(test, &d, 0, 0, P, 4);

	/* a seam: the page ends early, or the next piece starts late */
	ZDIO_DEST(test, &d, 512, {0, 0, P - 4}, {1, 0, P}, {2, 4, 8});
	KUNIT_EXPECT_EQ(test, 3, d.nr_segs);
	zdio_expect_seg(test, &d, 0, 512, P - 4, 0);
	zdio_expect_seg(test, &d, 1, 512 + P - 4, P, P);
	zdio_expect_seg(test, &d, 2, 512 + 2 * P - 4, 8, 2 * P + 4);

	/* the offset goes on, but not in the same page */
	ZDIO_DEST(test, &d, 0, {0, 0, 8}, {1, 8, 8});
	KUNIT_EXPECT_EQ(test, 2, d.nr_segs);
	zdio_expect_seg(test, &d, 1, 8, 8, P + 8);

	/* the same page twice takes two places */
	ZDIO_DEST(test, &d, 0, {0, 0, P}, {0, 0, P});
	KUNIT_EXPECT_EQ(test, 1, d.nr_segs);
	KUNIT_EXPECT_EQ(test, 2, d.nr_pages);
	KUNIT_EXPECT_PTR_EQ(test, d.pages[0], d.pages[1]);
}

/* What iomap makes of a large folio, and kernel callers of several */
static void zdio_add_large_test(struct kunit *test)
{
	struct page *page = alloc_pages(GFP_KERNEL | __GFP_COMP, 2);
	struct z_erofs_dio_dest d;
	struct bio_vec bv;
	int i;

	KUNIT_ASSERT_NOT_NULL(test, page);
	zdio_dest(test, &d, 0, NULL, 0);

	/* the second piece goes on in the last page of the first one */
	bvec_set_page(&bv, page, 2 * P, 512);
	z_erofs_dio_add(&d, &bv, 8192);
	KUNIT_EXPECT_EQ(test, 3, d.nr_pages);
	bvec_set_page(&bv, page + 2, 2 * P - 512, 512);
	z_erofs_dio_add(&d, &bv, 8192 + 2 * P);
	KUNIT_EXPECT_EQ(test, 4, d.nr_pages);
	for (i = 0; i < 4; ++i)
		KUNIT_EXPECT_PTR_EQ(test, page + i, d.pages[i]);
	KUNIT_EXPECT_EQ(test, 1, d.nr_segs);
	zdio_expect_seg(test, &d, 0, 8192, 4 * P - 512, 512);
	KUNIT_EXPECT_EQ(test, 1, d.nr_runs);

	/* the same segment, but elsewhere in memory */
	bvec_set_page(&bv, page + 1, P, 0);
	z_erofs_dio_add(&d, &bv, 8192 + 4 * P - 512);
	KUNIT_EXPECT_EQ(test, 1, d.nr_segs);
	KUNIT_EXPECT_EQ(test, 2, d.nr_runs);
	__free_pages(page, 2);
}

static void zdio_references_test(struct kunit *test)
{
	struct page *large = alloc_pages(GFP_KERNEL | __GFP_COMP, 2);
	struct zdio_pages *p = test->priv;
	struct page *pages[] = { p->page[0], large, large + 1, large + 2,
				 p->page[1] };
	int i;

	KUNIT_ASSERT_NOT_NULL(test, large);
	/* one of each folio, wherever in it the pages begin */
	for (i = 0; i < 5; ++i)
		z_erofs_dio_hold_page(pages, i, pages[i]);
	KUNIT_EXPECT_EQ(test, 2, page_count(p->page[0]));
	KUNIT_EXPECT_EQ(test, 2, page_count(large));
	KUNIT_EXPECT_EQ(test, 2, page_count(p->page[1]));
	z_erofs_dio_hold_page(pages + 3, 0, pages[3]);
	KUNIT_EXPECT_EQ(test, 3, page_count(large));
	z_erofs_dio_put_pages(pages + 3, 1);
	z_erofs_dio_put_pages(pages, 5);
	KUNIT_EXPECT_EQ(test, 1, page_count(p->page[0]));
	KUNIT_EXPECT_EQ(test, 1, page_count(large));
	KUNIT_EXPECT_EQ(test, 1, page_count(p->page[1]));
	__free_pages(large, 2);
}

static void zdio_drop_ahead_test(struct kunit *test)
{
	struct page *large = alloc_pages(GFP_KERNEL | __GFP_COMP, 2);
	struct zdio_pages *p = test->priv;
	struct z_erofs_dio_ahead *a;

	KUNIT_ASSERT_NOT_NULL(test, large);
	a = kunit_kzalloc(test, sizeof(*a), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, a);
	z_erofs_dio_hold_page(a->pages, 0, p->page[0]);
	z_erofs_dio_hold_page(a->pages, 1, large);
	z_erofs_dio_hold_page(a->pages, 2, large + 1);
	a->nr = 3;
	a->pa = 8 * P;

	/* a folio is held until its last page isn't needed any more */
	z_erofs_dio_drop_ahead(a, 2);
	KUNIT_EXPECT_EQ(test, 1, page_count(p->page[0]));
	KUNIT_EXPECT_EQ(test, 2, page_count(large));
	KUNIT_EXPECT_EQ(test, 1, a->nr);
	KUNIT_EXPECT_PTR_EQ(test, large + 1, a->pages[0]);
	KUNIT_EXPECT_EQ(test, 10 * P, a->pa);
	z_erofs_dio_drop_ahead(a, 1);
	KUNIT_EXPECT_EQ(test, 1, page_count(large));
	KUNIT_EXPECT_EQ(test, 0, a->nr);
	__free_pages(large, 2);
}

static void zdio_seg_test(struct kunit *test)
{
	struct z_erofs_dio_dest d;

	ZDIO_DEST(test, &d, 1024, {0, 0, 4}, {0, 8, 1}, {1, 4, 8}, {2, 4, 4});
	KUNIT_ASSERT_EQ(test, 4, d.nr_segs);
	KUNIT_EXPECT_PTR_EQ(test, d.segs, z_erofs_dio_seg(&d, 1024));
	KUNIT_EXPECT_PTR_EQ(test, d.segs, z_erofs_dio_seg(&d, 1027));
	KUNIT_EXPECT_PTR_EQ(test, d.segs + 1, z_erofs_dio_seg(&d, 1028));
	KUNIT_EXPECT_PTR_EQ(test, d.segs + 2, z_erofs_dio_seg(&d, 1029));
	KUNIT_EXPECT_PTR_EQ(test, d.segs + 2, z_erofs_dio_seg(&d, 1036));
	KUNIT_EXPECT_PTR_EQ(test, d.segs + 3, z_erofs_dio_seg(&d, 1037));
	KUNIT_EXPECT_PTR_EQ(test, d.segs + 3, z_erofs_dio_seg(&d, 1040));
}

static void zdio_expect_layout(struct kunit *test, struct z_erofs_dio_dest *d,
			       loff_t la, unsigned int len, loff_t from,
			       unsigned int mask,
			       struct z_erofs_dio_layout want)
{
	struct z_erofs_dio_layout lo = {};

	z_erofs_dio_lay_out(d, la, len, from, mask, &lo);
	KUNIT_EXPECT_EQ(test, want.pageofs, lo.pageofs);
	KUNIT_EXPECT_EQ(test, want.nr, lo.nr);
	KUNIT_EXPECT_EQ(test, want.direct, lo.direct);
	KUNIT_EXPECT_EQ(test, want.edirect, lo.edirect);
	if (want.direct < want.edirect)
		KUNIT_EXPECT_EQ(test, want.page, lo.page);
}

#define LAYOUT(...)	((struct z_erofs_dio_layout) { __VA_ARGS__ })

/* One segment of page-aligned memory for the file from 4 P on */
static void zdio_lay_out_aligned_test(struct kunit *test)
{
	const loff_t pos = 4 * P;
	struct z_erofs_dio_dest d;

	ZDIO_DEST(test, &d, pos, {0, 0, P}, {1, 0, P}, {2, 0, P}, {3, 0, P});

	/* all of it, one page of it, one byte of it */
	zdio_expect_layout(test, &d, pos, 4 * P, pos, 0, LAYOUT(0, 4, 0, 4, 0));
	zdio_expect_layout(test, &d, pos + P, P, pos + P, 0,
			   LAYOUT(0, 1, 0, 1, 1));
	zdio_expect_layout(test, &d, pos + 2 * P - 1, 1, pos + 2 * P - 1, 0,
			   LAYOUT(P - 1, 1, 0, 1, 1));
	/* two bytes across a page boundary */
	zdio_expect_layout(test, &d, pos + 2 * P - 1, 2, pos + 2 * P - 1, 0,
			   LAYOUT(P - 1, 2, 0, 2, 1));
	/* a byte before the window: its page isn't ours */
	zdio_expect_layout(test, &d, pos - 1, P + 1, pos, 0,
			   LAYOUT(P - 1, 2, 1, 2, 0));
	/* .. a page, and a byte more */
	zdio_expect_layout(test, &d, pos - P, 2 * P, pos, 0,
			   LAYOUT(0, 2, 1, 2, 0));
	zdio_expect_layout(test, &d, pos - P - 1, 2 * P, pos, 0,
			   LAYOUT(P - 1, 3, 2, 3, 0));
	/* the last page may be used in part: nothing follows the extent */
	zdio_expect_layout(test, &d, pos - 1, 2, pos, 0,
			   LAYOUT(P - 1, 2, 1, 2, 0));
}

/* One segment which starts 512 bytes into a page */
static void zdio_lay_out_offset_test(struct kunit *test)
{
	const loff_t pos = 4 * P;
	struct z_erofs_dio_dest d;

	ZDIO_DEST(test, &d, pos, {0, 512, P - 512}, {1, 0, P}, {2, 0, 512});

	zdio_expect_layout(test, &d, pos, 2 * P, pos, 0,
			   LAYOUT(512, 3, 0, 3, 0));
	/* ends with the first page, and just behind it */
	zdio_expect_layout(test, &d, pos, P - 512, pos, 0,
			   LAYOUT(512, 1, 0, 1, 0));
	zdio_expect_layout(test, &d, pos, P - 511, pos, 0,
			   LAYOUT(512, 2, 0, 2, 0));
	/* a byte before the window is in the same page: copy that page */
	zdio_expect_layout(test, &d, pos - 1, P, pos, 0,
			   LAYOUT(511, 2, 1, 2, 1));
	zdio_expect_layout(test, &d, pos - 512, P, pos, 0,
			   LAYOUT(0, 1, 1, 1, 1));
	zdio_expect_layout(test, &d, pos - 513, P + 1, pos, 0,
			   LAYOUT(P - 1, 2, 2, 2, 2));
	/* interlaced blocks of 512 bytes agree with that offset .. */
	zdio_expect_layout(test, &d, pos, 2 * P, pos, 511,
			   LAYOUT(512, 3, 0, 3, 0));
	/* .. and larger ones don't: copy everything */
	zdio_expect_layout(test, &d, pos, 2 * P, pos, P - 1,
			   LAYOUT(0, 2, 0, 0, 0));
	zdio_expect_layout(test, &d, pos + 1, 2 * P - 1, pos + 1, P - 1,
			   LAYOUT(1, 2, 0, 0, 0));
}

/* Segments of P + 512, P and 512 bytes which meet in the middle of pages */
static void zdio_lay_out_seam_test(struct kunit *test)
{
	const loff_t pos = 0, seam = P + 512, seam2 = 2 * P + 512;
	struct z_erofs_dio_dest d;

	ZDIO_DEST(test, &d, pos, {0, 0, P}, {1, 0, 512},
		  {2, 1024, P - 1024}, {3, 0, 1024}, {4, 0, 512});
	KUNIT_ASSERT_EQ(test, 3, d.nr_segs);

	/* up to the seam, and one byte across: the page with the seam is cut */
	zdio_expect_layout(test, &d, pos, seam, pos, 0, LAYOUT(0, 2, 0, 2, 0));
	zdio_expect_layout(test, &d, pos, seam + 1, pos, 0,
			   LAYOUT(0, 2, 0, 1, 0));
	/* all in one page */
	zdio_expect_layout(test, &d, seam - 1, 2, seam - 1, 0,
			   LAYOUT(511, 1, 0, 0, 1));
	/* from the seam on */
	zdio_expect_layout(test, &d, seam, P, seam, 0,
			   LAYOUT(1024, 2, 0, 2, 2));
	zdio_expect_layout(test, &d, seam, P + 1, seam, 0,
			   LAYOUT(1024, 2, 0, 1, 2));
	zdio_expect_layout(test, &d, seam2, 512, seam2, 0,
			   LAYOUT(0, 1, 0, 1, 4));
}

static void zdio_copy_test(struct kunit *test)
{
	struct zdio_pages *p = test->priv;
	struct z_erofs_dio_dest d;
	u8 *buf, *a, *b, *c;

	buf = kunit_kmalloc(test, P, GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, buf);
	memset(buf, 0x11, P);
	a = page_address(p->page[0]);
	b = page_address(p->page[1]);
	c = page_address(p->page[2]);
	ZDIO_DEST(test, &d, 100, {0, P - 2, 2}, {1, 0, 4}, {2, 8, 8});

	/* file bytes 101 .. 107: one, four and two bytes */
	z_erofs_dio_copy(&d, 101, buf, 7);
	KUNIT_EXPECT_EQ(test, 0xa5, a[P - 2]);
	KUNIT_EXPECT_EQ(test, 0x11, a[P - 1]);
	KUNIT_EXPECT_NULL(test, memchr_inv(b, 0x11, 4));
	KUNIT_EXPECT_EQ(test, 0xa5, b[4]);
	KUNIT_EXPECT_EQ(test, 0xa5, c[7]);
	KUNIT_EXPECT_NULL(test, memchr_inv(c + 8, 0x11, 2));
	KUNIT_EXPECT_EQ(test, 0xa5, c[10]);

	/* clear the last eight */
	z_erofs_dio_copy(&d, 106, NULL, 8);
	KUNIT_EXPECT_EQ(test, 0xa5, c[7]);
	KUNIT_EXPECT_NULL(test, memchr_inv(c + 8, 0, 8));
	KUNIT_EXPECT_EQ(test, 0xa5, c[16]);
	KUNIT_EXPECT_EQ(test, 0x11, b[3]);
}

static struct kunit_case zdio_cases[] = {
	KUNIT_CASE(zdio_cut_test),
	KUNIT_CASE(zdio_add_test),
	KUNIT_CASE(zdio_add_large_test),
	KUNIT_CASE(zdio_references_test),
	KUNIT_CASE(zdio_drop_ahead_test),
	KUNIT_CASE(zdio_seg_test),
	KUNIT_CASE(zdio_lay_out_aligned_test),
	KUNIT_CASE(zdio_lay_out_offset_test),
	KUNIT_CASE(zdio_lay_out_seam_test),
	KUNIT_CASE(zdio_copy_test),
	{}
};

static struct kunit_suite zdio_suite = {
	.name = "erofs_zdio",
	.init = zdio_init,
	.exit = zdio_exit,
	.test_cases = zdio_cases,
};

kunit_test_suite(zdio_suite);

#undef P
