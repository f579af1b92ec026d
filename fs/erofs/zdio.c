// SPDX-License-Identifier: GPL-2.0-only
/*
 * Direct I/O for compressed files
 *
 * iomap pins the destination, hands it over as bios and completes the request.
 * What it cannot know is how a range of a compressed file becomes bytes: that
 * is done here, one window of the file at a time.
 *
 * A direct read owns its pclusters: they are read into private pages and never
 * show up in managed_pslots, so no buffered reader can join them.  Destination
 * pages may be mapped by user space and change at any time.  Nothing but content
 * is ever read back from them (matches, literals and checksums of Zstandard): a
 * racing writer spoils its own buffer or read that way and nothing else, since
 * lengths and offsets only come from the (private) compressed data.
 */
#include "compress.h"
#include <linux/blkdev.h>
#include <linux/cacheinfo.h>
#include <linux/dma-mapping.h>
#include <linux/hash.h>
#include <linux/memremap.h>
#include <linux/ratelimit.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/semaphore.h>
#include <trace/events/erofs.h>

/* Destination bytes which are pinned and decoded together */
#define Z_EROFS_DIO_WINDOW		SZ_1M
/* Extents which are read and decoded together; fills 8KiB with the window */
#define Z_EROFS_DIO_MAX_EXTENTS		236
/* .. and their compressed pages; the last pcluster may go beyond */
#define Z_EROFS_DIO_MAX_INPAGES		min(128, SZ_1M / PAGE_SIZE)
/* They come from folios of this size, which are about as cheap as pages */
#define Z_EROFS_DIO_FOLIO		BIT(PAGE_ALLOC_COSTLY_ORDER)
/* .. or of up to this one for larger pclusters, if such are free */
#define Z_EROFS_DIO_MAX_FOLIO		(SZ_128K / PAGE_SIZE)
/* Windows of an asynchronous request which hold compressed data at a time */
#define Z_EROFS_DIO_STAGED		2
/* .. and those of all of a superblock, for each CPU */
#define Z_EROFS_DIO_STAGED_PER_CPU	4
/* Asynchronous windows of a superblock; who submits more waits as for a device */
#define Z_EROFS_DIO_MAX_WINDOWS		1024
/* Larger requests are always synchronous: others are pinned as a whole */
#define Z_EROFS_DIO_MAX_ASYNC		SZ_32M
/* One more CPU is asked to help for each of so many bytes of a window */
#define Z_EROFS_DIO_HELP		SZ_128K
#define Z_EROFS_DIO_MAX_HELPERS		7
/* Memory that is nice to have: it is not worth any reclaim */
#define Z_EROFS_DIO_GFP_CHEAP	((GFP_KERNEL & ~__GFP_RECLAIM) | __GFP_NOWARN)
/* The distance of LZ4 matches is less than 64KiB */
#define Z_EROFS_DIO_LZ4_PAGES		(SZ_64K / PAGE_SIZE + 1)
/*
 * Buffered reads of at least this size are dropped behind: smaller ones would
 * decode the same pcluster over and over
 */
#define Z_EROFS_DIO_DONTCACHE		SZ_128K

/* Decoded bytes kept for a sequential reader behind its last request */
#define Z_EROFS_DIO_KEEP		SZ_1M
/* .. and compressed ones that are read ahead */
#define Z_EROFS_DIO_AHEAD		SZ_512K
/* All files together have one page in so many for both */
#define Z_EROFS_DIO_MAX_KEPT		256
/* Asynchronous requests of up to this size take turns, if they are this close */
#define Z_EROFS_DIO_TURN		SZ_32K
#define Z_EROFS_DIO_CLOSE		SZ_128K

/*
 * Compressed data which a sequential reader is likely to need: the blocks that
 * follow those of its last request on the device.  They are looked at only if
 * an extent turns out to be there.
 */
struct z_erofs_dio_ahead {
	struct erofs_device_info *dif;
	erofs_off_t pa;			/* of the first page, within @dif */
	unsigned int nr, nr_read;	/* pages; those behind are being read */
	bool used;
	unsigned int missed, wait;	/* requests for which nothing is read */
	blk_status_t status;
	struct completion done;
	struct page *pages[Z_EROFS_DIO_AHEAD / PAGE_SIZE];
};

/*
 * What is known of the last request of an open file, and decoded bytes behind
 * it.  Whoever has set bit 0 of @busy owns all that isn't said to be locked:
 *
 * - a synchronous request, from z_erofs_dio_get_keep() until it returns;
 * - a small asynchronous one in z_erofs_dio_try_kept(), or a window of it from
 *   z_erofs_dio_take_turn() to z_erofs_dio_end_turn(): z_erofs_dio_pass_turn()
 *   serves those in @waiting that only need a copy, then the next one goes on;
 * - the shrinker, under z_erofs_dio_kept_lock.
 *
 * The owner may be in a page fault that needs another request of the same file,
 * so the others do without rather than wait.  Windows of asynchronous requests
 * do wait for each other (@turns): they don't fault.
 */
struct z_erofs_dio_keep {
	refcount_t ref;			/* of its file and of what is being read */
	struct erofs_sb_info *sbi;
	unsigned long busy;
	spinlock_t lock;		/* of the two below */
	bool turns;			/* the owner is asynchronous */
	struct list_head waiting;	/* .. and these are next */
	loff_t came;			/* where the last ends: a guess */
	/* changed by the owner, and under z_erofs_dio_kept_lock */
	struct list_head lru;
	unsigned int nr;		/* pages that are accounted for */
	loff_t next;			/* where a sequential reader goes on */
	loff_t pos, end;		/* the first page has the byte at @pos */
	void *addr;			/* where @nr_pages @pages are mapped */
	struct page **pages;
	unsigned int nr_pages;
	struct z_erofs_dio_ahead ahead;
};

static LIST_HEAD(z_erofs_dio_kept);
static DEFINE_SPINLOCK(z_erofs_dio_kept_lock);
static unsigned long z_erofs_dio_nr_kept;
static struct shrinker *z_erofs_dio_shrinker;
static struct bio_set z_erofs_dio_bioset;
/* What has not begun is not waited for: all superblocks share them */
static struct workqueue_struct *z_erofs_dio_helpers;

/*
 * Bytes of the destination which follow each other in memory, apart from page
 * boundaries: the file byte at @pos + n lives in byte @base + n of the page
 * list.  Two segments meet at a seam, which can be anywhere in a page.
 */
struct z_erofs_dio_seg {
	loff_t pos;
	unsigned int len, base;
};

struct z_erofs_dio_dest {
	struct page **pages;
	struct z_erofs_dio_seg *segs;
	unsigned int nr_pages, nr_segs;
	unsigned int nr_runs;		/* of physically consecutive pages */
	unsigned int align;		/* offsets and lengths in memory, or'ed */
	void *addr;			/* of the first page if all are mapped */
};

/*
 * How an extent is laid out in the list of pages given to the decoder: its
 * first byte is byte @pageofs of the first of @nr pages, of which
 *
 * - [@direct, @edirect) are those of the destination, from its @page-th on;
 * - [@kept, @nr) are those of z_erofs_dio_keep, from its first one on;
 * - the others are temporary.
 *
 * Those of the destination hold nothing that doesn't belong there; from the
 * others, what is wanted is copied.  If something is kept, there are none of the
 * destination, otherwise @kept is @nr.  If all of it is (@kept is 0), the list is
 * the one of z_erofs_dio_keep.
 */
struct z_erofs_dio_layout {
	unsigned int pageofs, nr;
	unsigned int direct, edirect;
	unsigned int page;
	unsigned int kept;
};

struct z_erofs_dio_extent {
	erofs_off_t la, pa;
	unsigned int len;		/* bytes to decode from @la on */
	unsigned int plen;
	unsigned short in, inpages;	/* the compressed pages */
	unsigned short flags;		/* EROFS_MAP_* */
	unsigned char alg;
	bool partial : 1;
	bool plain : 1;			/* the device fills the destination */
	bool keep : 1;			/* what goes beyond the window */
	bool ahead : 1;			/* has been read ahead */
};

/* What the windows of a request have in common */
struct z_erofs_dio_req {
	struct file *file;		/* to read what can't be done directly */
	struct z_erofs_dio_keep *keep;	/* what its windows may use in turn */
	bool sequential;
	bool async;
	loff_t end;
	unsigned int ahead;		/* pages to be read behind it */
	refcount_t ref;			/* one per window and the submitter's */

	/* synchronous: the window which is being read */
	struct z_erofs_dio_window *staged;
	/* asynchronous: those with a slot or in line for one, and the rest */
	unsigned int nr_staged;
	struct list_head windows;
};

/*
 * Who decodes asynchronous requests of a superblock.  There can be any number of
 * them, so only windows that got a slot may hold compressed data.
 */
struct z_erofs_dio_workers {
	struct workqueue_struct *wq;
	struct semaphore windows;	/* how many more there may be */
	spinlock_t lock;		/* of the rest, and of those of requests */
	unsigned int nr_staged;
	struct list_head waiting;	/* windows in line for a slot */
};

struct z_erofs_dio_helper {
	struct work_struct work;
	struct z_erofs_dio_window *w;
};

struct z_erofs_dio_window {
	struct z_erofs_dio_req *req;
	/* NULL if it does without; asynchronous: its own from its turn on */
	struct z_erofs_dio_keep *keep;
	struct list_head link;
	unsigned int overtaken;		/* how often, while it waited */
	struct inode *inode;
	loff_t pos, end;		/* end is exclusive and never behind EOF */
	loff_t start;			/* in front of here it has been copied */
	loff_t rest;			/* from here on it has been staged */
	bool lz4;			/* .. and some of it is LZ4 */
	int err;
	bool counted;			/* as one of z_erofs_dio_workers */
	struct bio_list bios;		/* the destination, in file order */
	struct z_erofs_dio_dest dest;

	struct page **in;		/* compressed pages */
	struct page *pagepool;
	unsigned int nr_in;		/* to be allocated, or held in @in */

	struct bio *bio;		/* to be filled with more of them */
	struct erofs_device_info *dif;	/* .. from this device */
	atomic_t pending;		/* bios in flight + 1 */
	blk_status_t status;		/* of one that failed */
	union {
		struct completion done;		/* synchronous */
		struct work_struct work;	/* asynchronous */
	};

	atomic_t todo;			/* extents nobody has taken so far */
	atomic_t busy;			/* helpers which may take some + 1 */
	struct completion helped;
	struct z_erofs_dio_helper helper[Z_EROFS_DIO_MAX_HELPERS];

	/* in descending order, as they have been looked up */
	unsigned int nr_ext, max_ext;
	struct z_erofs_dio_extent ext[] __counted_by(max_ext);
};

/*
 * Extents end at any byte, windows have to end at a block boundary.  Cut the
 * window just behind the start of the extent [@la, @lend) which covers its
 * nominal end: that extent is then decoded twice for less than a block.  If it
 * already covers the start of the window, take it as a whole instead.
 */
static loff_t z_erofs_dio_cut(loff_t pos, loff_t la, loff_t lend,
			      unsigned int bs)
{
	loff_t end = round_up(la > pos ? la : lend, bs);

	/* with corrupted indexes it might even end before its start */
	return end > pos ? end : pos + Z_EROFS_DIO_WINDOW;
}

/* Append a piece of memory that is physically consecutive */
static void z_erofs_dio_add(struct z_erofs_dio_dest *d,
			    const struct bio_vec *bv, loff_t pos)
{
	struct page *page = bv->bv_page, *last = NULL;
	unsigned int nr = PFN_UP(bv->bv_offset + bv->bv_len);
	struct z_erofs_dio_seg *seg = NULL;

	if (d->nr_pages) {
		last = d->pages[d->nr_pages - 1];
		seg = d->segs + d->nr_segs - 1;
	}
	if (!last || offset_in_page(seg->base + seg->len) != bv->bv_offset ||
	    (bv->bv_offset && last != page)) {
		seg = d->segs + d->nr_segs++;
		*seg = (struct z_erofs_dio_seg) {
			.pos = pos,
			.base = (d->nr_pages << PAGE_SHIFT) + bv->bv_offset,
		};
	} else if (bv->bv_offset) {
		++page;
		--nr;
	}
	seg->len += bv->bv_len;
	if (nr && (!last || page_to_pfn(page) != page_to_pfn(last) + 1))
		++d->nr_runs;
	for (; nr; --nr)
		d->pages[d->nr_pages++] = page++;
}

/* Find the segment of the file byte at @pos, which has to be in @d */
static struct z_erofs_dio_seg *z_erofs_dio_seg(const struct z_erofs_dio_dest *d,
					       loff_t pos)
{
	unsigned int l = 0, r = d->nr_segs, mid;

	while (r - l > 1) {
		mid = l + (r - l) / 2;
		if (d->segs[mid].pos > pos)
			r = mid;
		else
			l = mid;
	}
	return d->segs + l;
}

/* .. as it would be in the page cache, without any destination page */
static void z_erofs_dio_lay_aside(loff_t la, unsigned int len,
				  struct z_erofs_dio_layout *lo)
{
	*lo = (struct z_erofs_dio_layout) { .pageofs = offset_in_page(la) };
	lo->nr = PFN_UP(lo->pageofs + len);
	lo->kept = lo->nr;
}

/*
 * Lay out the extent [@la, @la + @len), of which the bytes from @from on are
 * wanted (@from is in the destination), so that as many pages as possible of
 * the segment with @from can be used.  Bits in @mask are the ones in which the
 * page offset has to agree with the file offset.
 */
static void z_erofs_dio_lay_out(const struct z_erofs_dio_dest *d, loff_t la,
				unsigned int len, loff_t from,
				unsigned int mask, struct z_erofs_dio_layout *lo)
{
	const struct z_erofs_dio_seg *seg = z_erofs_dio_seg(d, from);
	/* where @la is in the page list, negative if in front of it */
	loff_t base = seg->base + (la - seg->pos);
	unsigned int head = la < seg->pos ? seg->pos - la : 0;

	lo->pageofs = base & ~PAGE_MASK;
	if ((lo->pageofs ^ la) & mask) {
		z_erofs_dio_lay_aside(la, len, lo);
		return;
	}
	lo->nr = PFN_UP(lo->pageofs + len);
	lo->kept = lo->nr;
	lo->direct = head ? PFN_UP(lo->pageofs + head) : 0;
	lo->edirect = lo->nr;
	if (la + len > seg->pos + seg->len)
		lo->edirect = (lo->pageofs + (u32)(seg->pos + seg->len - la)) >>
				PAGE_SHIFT;
	lo->edirect = max(lo->direct, lo->edirect);
	lo->page = (base >> PAGE_SHIFT) + lo->direct;
}

/* The memory of the file byte at @pos and what follows of @len in its page */
static struct bio_vec z_erofs_dio_bvec(const struct z_erofs_dio_dest *d,
				       loff_t pos, unsigned int len)
{
	const struct z_erofs_dio_seg *seg = z_erofs_dio_seg(d, pos);
	unsigned int skip = pos - seg->pos, cur = seg->base + skip;
	struct bio_vec bv = {
		.bv_page = d->pages[cur >> PAGE_SHIFT],
		.bv_offset = offset_in_page(cur),
	};

	bv.bv_len = min3(len, seg->len - skip, PAGE_SIZE - bv.bv_offset);
	return bv;
}

/* Copy to the destination, or clear it if there is no @src */
static void z_erofs_dio_copy(const struct z_erofs_dio_dest *d, loff_t pos,
			     const void *src, unsigned int len)
{
	struct bio_vec bv;

	for (; len; len -= bv.bv_len, pos += bv.bv_len) {
		bv = z_erofs_dio_bvec(d, pos, len);
		if (src) {
			memcpy_to_bvec(&bv, src);
			src += bv.bv_len;
		} else {
			memzero_bvec(&bv);
		}
	}
}

/*
 * Decoders write bytes which aren't final, so folios another filesystem keeps
 * private data for are left to the page cache, and so is memory of PCI devices.
 */
static bool z_erofs_dio_is_foreign(const struct bio_vec *bv)
{
	unsigned int nr = PFN_UP(bv->bv_offset + bv->bv_len);
	struct folio *folio;
	unsigned int i;

	/* those of the kernel may consist of several folios */
	for (i = 0; i < nr; i += folio_nr_pages(folio) -
				 folio_page_idx(folio, bv->bv_page + i)) {
		folio = page_folio(bv->bv_page + i);
		if (folio_test_private(folio) || folio_is_pci_p2pdma(folio))
			return true;
	}
	return false;
}

/* Which bytes of the @i-th page are listed at its place */
static struct bio_vec z_erofs_dio_listed(const struct z_erofs_dio_dest *d,
					 unsigned int i)
{
	unsigned int l = 0, r = d->nr_segs, mid, from, to;

	/* pages of a segment are no other's */
	while (r - l > 1) {
		mid = l + (r - l) / 2;
		if (d->segs[mid].base >> PAGE_SHIFT > i)
			r = mid;
		else
			l = mid;
	}
	from = max(d->segs[l].base, i << PAGE_SHIFT);
	to = min(d->segs[l].base + d->segs[l].len, (i + 1) << PAGE_SHIFT);
	return (struct bio_vec) {
		.bv_offset = offset_in_page(from),
		.bv_len = to - from,
	};
}

/*
 * A page may be listed twice, by way of two mappings, or as the place for bytes
 * that nobody wants.  Matches that are to be copied from there would be those of
 * another place, and end up in pages which are listed once.  Other parts of a
 * page are fine, if they aren't many.
 */
static int z_erofs_dio_check_repeats(const struct z_erofs_dio_dest *d)
{
	unsigned int bits = order_base_2(d->nr_pages) + 1, i, at, again;
	struct bio_vec a, b;
	int err = 0;
	u32 *seen;

	if (d->nr_runs == 1)
		return 0;
	/* at most one in two is used; 0 if it is not */
	seen = kvzalloc_objs(*seen, BIT(bits));
	if (!seen)
		return -ENOMEM;
	for (i = 0; i < d->nr_pages && !err; seen[at] = ++i) {
		again = 0;
		at = hash_ptr(d->pages[i], bits);
		for (; seen[at]; at = (at + 1) & (BIT(bits) - 1)) {
			if (d->pages[seen[at] - 1] != d->pages[i])
				continue;
			a = z_erofs_dio_listed(d, seen[at] - 1);
			b = z_erofs_dio_listed(d, i);
			if (++again > 16 ||
			    (a.bv_offset < b.bv_offset + b.bv_len &&
			     b.bv_offset < a.bv_offset + a.bv_len))
				err = -EEXIST;
		}
	}
	kvfree(seen);
	return err;
}

/*
 * Gather the destination, or -ENOTBLK if it is not for decoders, or -EEXIST if
 * some of it is listed twice.
 */
static int z_erofs_dio_gather(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_dest *d = &w->dest;
	struct bvec_iter iter;
	struct bio_vec bv;
	struct bio *bio;
	loff_t pos = w->pos;
	unsigned int nr = 0;

	bio_list_for_each(bio, &w->bios)
		nr += bio_segments(bio);
	/* each of them can begin a page and a segment, and none begins more */
	d->pages = kvmalloc_objs(*d->pages, nr);
	d->segs = kvmalloc_objs(*d->segs, nr);
	if (!d->pages || !d->segs)
		return -ENOMEM;

	bio_list_for_each(bio, &w->bios) {
		bio_for_each_bvec(bv, bio, iter) {
			bv.bv_page += bv.bv_offset >> PAGE_SHIFT;
			bv.bv_offset = offset_in_page(bv.bv_offset);
			if (z_erofs_dio_is_foreign(&bv))
				return -ENOTBLK;
			z_erofs_dio_add(d, &bv, pos);
			d->align |= bv.bv_offset | bv.bv_len;
			pos += bv.bv_len;
		}
	}
	return z_erofs_dio_check_repeats(d);
}

static void z_erofs_dio_copy_page(const struct z_erofs_dio_dest *d, loff_t pos,
				  struct page *page, unsigned int ofs,
				  unsigned int len)
{
	void *src = kmap_local_page(page);

	z_erofs_dio_copy(d, pos, src + ofs, len);
	kunmap_local(src);
}

/* Where the kept byte of the file at @pos is mapped */
static void *z_erofs_dio_kept_addr(struct z_erofs_dio_keep *k, loff_t pos)
{
	return k->addr + (pos - round_down(k->pos, PAGE_SIZE));
}

/* Nothing is kept any more; returns what is left to be freed by vfree() */
static void *z_erofs_dio_drop(struct z_erofs_dio_keep *k)
{
	void *addr = k->addr;

	k->end = 0;
	k->addr = NULL;
	k->nr_pages = 0;
	return addr;
}

/*
 * Pages of a folio that follow each other in a list have a single reference.
 * Those in front of the @i-th are held already.
 */
static void z_erofs_dio_hold_page(struct page **pages, unsigned int i,
				  struct page *page)
{
	if (!i || page_folio(page) != page_folio(pages[i - 1]))
		folio_get(page_folio(page));
	pages[i] = page;
}

static void z_erofs_dio_put_pages(struct page **pages, unsigned int nr)
{
	struct folio *folio;

	while (nr) {
		folio = page_folio(pages[--nr]);
		if (!nr || page_folio(pages[nr - 1]) != folio)
			folio_put(folio);
	}
}

/* The first @nr pages of what has been read ahead aren't needed any more */
static void z_erofs_dio_drop_ahead(struct z_erofs_dio_ahead *a, unsigned int nr)
{
	if (nr && nr < a->nr &&
	    page_folio(a->pages[nr]) == page_folio(a->pages[nr - 1]))
		folio_get(page_folio(a->pages[nr]));
	z_erofs_dio_put_pages(a->pages, nr);
	a->nr -= nr;
	a->nr_read = a->nr;
	a->pa += (erofs_off_t)nr << PAGE_SHIFT;
	memmove(a->pages, a->pages + nr, a->nr * sizeof(*a->pages));
}

/* Nothing is being read ahead: all of it can be used, or nothing if it failed */
static void z_erofs_dio_settle_ahead(struct z_erofs_dio_ahead *a)
{
	a->nr_read = a->nr;
	if (a->status)
		z_erofs_dio_drop_ahead(a, a->nr);
}

/* @nr pages are held from now on; called by the owner of @k */
static void z_erofs_dio_account(struct z_erofs_dio_keep *k, unsigned int nr)
{
	lockdep_assert_held(&z_erofs_dio_kept_lock);
	WRITE_ONCE(z_erofs_dio_nr_kept, z_erofs_dio_nr_kept - k->nr + nr);
	k->nr = nr;
	if (nr)
		list_move_tail(&k->lru, &z_erofs_dio_kept);
	else
		list_del_init(&k->lru);
}

/* Drop what is there for the longest time; returns how many pages that was */
static unsigned long z_erofs_dio_shrink_one(void)
{
	struct z_erofs_dio_keep *k;
	unsigned long freed = 0;
	void *addr = NULL;

	spin_lock(&z_erofs_dio_kept_lock);
	list_for_each_entry(k, &z_erofs_dio_kept, lru) {
		if (test_and_set_bit_lock(0, &k->busy))
			continue;
		if (completion_done(&k->ahead.done)) {
			freed = k->nr;
			addr = z_erofs_dio_drop(k);
			z_erofs_dio_drop_ahead(&k->ahead, k->ahead.nr);
			z_erofs_dio_account(k, 0);
		}
		clear_bit_unlock(0, &k->busy);
		if (freed)
			break;
	}
	spin_unlock(&z_erofs_dio_kept_lock);
	vfree(addr);
	return freed;
}

/*
 * If all other files together have too many pages, take them from those that have
 * had theirs for the longest time; if they are read on, they get new ones.
 */
static bool z_erofs_dio_may_keep(struct z_erofs_dio_keep *k)
{
	while (READ_ONCE(z_erofs_dio_nr_kept) - k->nr >=
	       totalram_pages() / Z_EROFS_DIO_MAX_KEPT)
		if (!z_erofs_dio_shrink_one())
			return false;
	return true;
}

/* Have room for @nr pages */
static bool z_erofs_dio_make_room(struct z_erofs_dio_keep *k, unsigned int nr)
{
	unsigned int got = 0, before;
	struct page **pages;

	if (nr <= k->nr_pages)
		return true;
	vfree(z_erofs_dio_drop(k));
	if (!z_erofs_dio_may_keep(k))
		return false;
	nr = round_up(nr, DIV_ROUND_UP(SZ_64K, PAGE_SIZE));
	pages = kvcalloc(nr, sizeof(*pages), Z_EROFS_DIO_GFP_CHEAP);
	if (!pages)
		return false;
	do {
		before = got;
		got = alloc_pages_bulk(Z_EROFS_DIO_GFP_CHEAP, nr, pages);
	} while (got > before && got < nr);
	if (got == nr)
		k->addr = vmap(pages, nr, VM_MAP | VM_MAP_PUT_PAGES,
			       PAGE_KERNEL);
	if (!k->addr) {
		release_pages(pages, got);
		kvfree(pages);
		return false;
	}
	k->pages = pages;
	k->nr_pages = nr;
	return true;
}

static unsigned long z_erofs_dio_shrink_count(struct shrinker *shrink,
					      struct shrink_control *sc)
{
	return READ_ONCE(z_erofs_dio_nr_kept);
}

static unsigned long z_erofs_dio_shrink_scan(struct shrinker *shrink,
					     struct shrink_control *sc)
{
	unsigned long freed = 0, nr;

	while (freed < sc->nr_to_scan && (nr = z_erofs_dio_shrink_one()))
		freed += nr;
	sc->nr_scanned = freed;
	return freed ?: SHRINK_STOP;
}

/* At once, as the end of the window may replace it before its start is due */
static void z_erofs_dio_copy_kept(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_keep *k = w->keep;

	if (!k || w->pos < k->pos || w->pos >= k->end)
		return;
	w->start = min(w->end, k->end);
	z_erofs_dio_copy(&w->dest, w->pos, z_erofs_dio_kept_addr(k, w->pos),
			 w->start - w->pos);
}

/*
 * The page cache never differs, and copying is cheaper than decoding.  False if
 * only a part is there: that has been copied in vain, and is decoded, too.
 */
static bool z_erofs_dio_copy_cached(struct z_erofs_dio_window *w, loff_t pos,
				    loff_t end)
{
	struct address_space *mapping = w->req->file->f_mapping;
	struct folio *folio;
	unsigned int len;
	bool found = READ_ONCE(mapping->nrpages);

	for (; found && pos < end; pos += len) {
		folio = __filemap_get_folio(mapping, pos >> PAGE_SHIFT,
					    FGP_DONTCACHE, 0);
		if (IS_ERR(folio))
			return false;
		len = min_t(loff_t, end - pos, PAGE_SIZE - offset_in_page(pos));
		found = folio_test_uptodate(folio);
		if (found)
			z_erofs_dio_copy_page(&w->dest, pos,
					      folio_file_page(folio, pos >> PAGE_SHIFT),
					      offset_in_page(pos), len);
		folio_put(folio);
	}
	return found;
}

/*
 * Which device can read plain blocks straight into the destination: they have
 * to be at the same place in both, and iomap has made the bios for the first
 * device, which may have demanded less.
 */
static struct erofs_device_info *
z_erofs_dio_plain_dev(struct z_erofs_dio_window *w,
		      const struct erofs_map_blocks *map, loff_t from)
{
	struct super_block *sb = w->inode->i_sb;
	struct erofs_map_dev mdev = { .m_pa = map->m_pa };
	unsigned int mask;

	if (map->m_algorithmformat < Z_EROFS_COMPRESSION_MAX ||
	    (map->m_flags & (EROFS_MAP_MAPPED | EROFS_MAP_META |
			     EROFS_MAP_FRAGMENT)) != EROFS_MAP_MAPPED ||
	    erofs_is_fileio_mode(EROFS_SB(sb)) ||
	    w->rest - map->m_la > map->m_plen ||
	    (map->m_la | map->m_pa) & (sb->s_blocksize - 1))
		return NULL;
	/* interlaced ones of many blocks begin with the last one */
	if (map->m_algorithmformat == Z_EROFS_COMPRESSION_INTERLACED &&
	    map->m_plen > sb->s_blocksize)
		return NULL;
	/* what is decoded meanwhile must not share lines of caches with them */
	if (w->dest.align & (dma_get_cache_alignment() - 1))
		return NULL;

	(void)erofs_map_dev(sb, &mdev);
	mask = erofs_dio_unit(mdev.m_bdev) - 1;
	mdev.m_pa += mdev.m_dif->fsoff + (from - map->m_la);
	if ((from | w->rest | w->pos | mdev.m_pa) & mask ||
	    bdev_logical_block_size(mdev.m_bdev) >
	    bdev_logical_block_size(sb->s_bdev) ||
	    bdev_dma_alignment(mdev.m_bdev) > bdev_dma_alignment(sb->s_bdev))
		return NULL;
	return mdev.m_dif;
}

/* Decode more of the last extent of a request, which ends at @lend */
static void z_erofs_dio_extend(struct z_erofs_dio_window *w,
			       struct z_erofs_dio_extent *e, loff_t lend)
{
	loff_t end = min(lend, w->end + Z_EROFS_DIO_KEEP);

	if (end <= w->end || w->end - w->rest > Z_EROFS_DIO_KEEP)
		return;
	e->keep = true;
	e->len = end - e->la;
	e->partial = !EROFS_MAP_FULL(e->flags) || end < lend;
}

/*
 * Look up the extent that has the last byte in front of w->rest.  The next
 * request is going to need the rest of the last one, so find out where that
 * ends (@keep), unless it fails: nobody has asked for those bytes.
 */
static int z_erofs_dio_lookup(struct z_erofs_dio_window *w,
			      struct erofs_map_blocks *map, bool *keep)
{
	/* known to be right in front of another one, apart from the first */
	int flags = w->rest == map->m_la ? EROFS_GET_BLOCKS_PREVIOUS : 0;
	int err;

	*keep = w->keep && w->req->sequential && w->rest == w->req->end;
	map->m_la = w->rest - 1;
	map->m_llen = map->m_la - w->start;
	err = z_erofs_map_blocks_iter(w->inode, map, *keep ?
				      EROFS_GET_BLOCKS_FIEMAP : flags);
	if (*keep && (err || map->m_la + map->m_llen < w->rest)) {
		*keep = false;
		map->m_la = w->rest - 1;
		err = z_erofs_map_blocks_iter(w->inode, map, 0);
	}
	/* -EINVAL is what devices refuse */
	if (err == -EINVAL || (!err && map->m_la + map->m_llen < w->rest))
		err = -EFSCORRUPTED;
	return err;
}

/*
 * Look up extents backwards from w->rest until there are enough to work on.
 * Those that are decoded begin where they do on disk, the others no earlier
 * than what is wanted of them.
 */
static int z_erofs_dio_map(struct z_erofs_dio_window *w)
{
	struct super_block *sb = w->inode->i_sb;
	struct erofs_map_blocks map = { .buf = __EROFS_BUF_INITIALIZER };
	struct z_erofs_dio_extent *e = NULL;
	struct erofs_device_info *dif, *last = NULL;	/* of @e, if plain */
	loff_t from;
	int err = 0;
	bool keep;

	/* each lookup may pass all extent records of the file, a million or more */
	while (w->rest > w->start && w->nr_ext < w->max_ext &&
	       w->nr_in < Z_EROFS_DIO_MAX_INPAGES &&
	       !fatal_signal_pending(current)) {
		err = z_erofs_dio_lookup(w, &map, &keep);
		if (err)
			break;
		from = max_t(loff_t, map.m_la, w->start);
		if (z_erofs_dio_copy_cached(w, from, w->rest)) {
			w->rest = from;
			last = NULL;
			continue;
		}
		dif = z_erofs_dio_plain_dev(w, &map, from);
		if (dif && dif == last &&
		    map.m_pa + (w->rest - map.m_la) == e->pa) {
			/* just the blocks in front of those before */
			e->len += w->rest - from;
			e->la = from;
			e->pa = map.m_pa + (from - map.m_la);
			w->rest = from;
			continue;
		}
		last = dif;
		e = &w->ext[w->nr_ext++];
		*e = (struct z_erofs_dio_extent) {
			.la = map.m_la,
			.pa = map.m_flags & EROFS_MAP_MAPPED ? map.m_pa : 0,
			.plen = map.m_plen,
			.flags = map.m_flags,
			.alg = map.m_algorithmformat,
			.partial = !EROFS_MAP_FULL(map.m_flags) ||
				   map.m_la + map.m_llen > w->rest,
			.plain = !!dif,
		};
		if (dif || !(map.m_flags & EROFS_MAP_MAPPED)) {
			/* nothing is decoded, so there is no need to start there */
			e->la = from;
			e->pa += from - map.m_la;
		} else {
			e->inpages = PFN_UP(erofs_blkoff(sb, e->pa) + e->plen);
			w->nr_in += e->inpages;
			w->lz4 |= e->alg == Z_EROFS_COMPRESSION_LZ4;
		}
		e->len = w->rest - e->la;
		w->rest = from;
		if (keep && e->inpages)
			z_erofs_dio_extend(w, e, map.m_la + map.m_llen);
	}
	erofs_put_metabuf(&map.buf);
	if (err) {
		/* no page has been allocated so far */
		w->nr_ext = 0;
		w->nr_in = 0;
	}
	return err;
}

static void z_erofs_dio_queue_work(struct z_erofs_dio_window *w)
{
	queue_work(EROFS_I_SB(w->inode)->dio_workers->wq, &w->work);
}

/* False if it has to wait: then a worker will begin with it, or has done so */
static bool z_erofs_dio_get_slot(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_workers *p = EROFS_I_SB(w->inode)->dio_workers;

	guard(spinlock)(&p->lock);
	if (w->req->nr_staged == Z_EROFS_DIO_STAGED) {
		list_add_tail(&w->link, &w->req->windows);
		return false;
	}
	++w->req->nr_staged;
	if (p->nr_staged >= Z_EROFS_DIO_STAGED_PER_CPU * num_online_cpus()) {
		list_add_tail(&w->link, &p->waiting);
		return false;
	}
	++p->nr_staged;
	return true;
}

/* Pass the slot on to the next window of the request, or of another one */
static void z_erofs_dio_put_slot(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_workers *p = EROFS_I_SB(w->inode)->dio_workers;
	struct list_head *from = &w->req->windows;
	struct z_erofs_dio_window *next;

	guard(spinlock)(&p->lock);
	if (list_empty(from)) {
		--w->req->nr_staged;
		from = &p->waiting;
	}
	next = list_first_entry_or_null(from, struct z_erofs_dio_window, link);
	if (next) {
		list_del(&next->link);
		z_erofs_dio_queue_work(next);
	} else {
		--p->nr_staged;
	}
}

/* Callers who wait decode on their own: they need not wait for a worker, too */
static void z_erofs_dio_endio(struct bio *bio)
{
	struct z_erofs_dio_window *w = bio->bi_private;

	if (bio->bi_status)
		WRITE_ONCE(w->status, bio->bi_status);
	/* those without are part of a request for the file of the image */
	if (bio->bi_bdev)
		bio_put(bio);
	if (!atomic_dec_and_test(&w->pending))
		return;
	if (w->req->async)
		z_erofs_dio_queue_work(w);
	else
		complete(&w->done);
}

static void z_erofs_dio_submit(struct z_erofs_dio_window *w)
{
	struct bio *bio = w->bio;

	if (!bio)
		return;
	w->bio = NULL;
	atomic_inc(&w->pending);
	if (erofs_is_fileio_mode(EROFS_I_SB(w->inode)))
		erofs_fileio_submit_bio(bio);
	else
		submit_bio(bio);
}

/* Read what @bv takes, from @cur on, with w->bio or another one if it's full */
static void z_erofs_dio_read_bvec(struct z_erofs_dio_window *w,
				  struct erofs_map_dev *mdev, erofs_off_t cur,
				  const struct bio_vec *bv)
{
	if (w->bio && w->dif == mdev->m_dif &&
	    bio_end_sector(w->bio) == cur >> SECTOR_SHIFT &&
	    bio_add_page(w->bio, bv->bv_page, bv->bv_len, bv->bv_offset))
		return;

	z_erofs_dio_submit(w);
	if (erofs_is_fileio_mode(EROFS_SB(mdev->m_sb)))
		w->bio = erofs_fileio_bio_alloc(mdev);
	else
		w->bio = bio_alloc(mdev->m_bdev,
				   bio_max_segs(w->nr_in),
				   REQ_OP_READ | REQ_SYNC, GFP_KERNEL);
	w->dif = mdev->m_dif;
	w->bio->bi_iter.bi_sector = cur >> SECTOR_SHIFT;
	w->bio->bi_ioprio = bio_list_peek(&w->bios)->bi_ioprio;
	/* this may be a worker, but the submitter is to be charged */
	if (w->bio->bi_bdev)
		bio_clone_blkg_association(w->bio, bio_list_peek(&w->bios));
	w->bio->bi_private = w;
	w->bio->bi_end_io = z_erofs_dio_endio;
	__bio_add_page(w->bio, bv->bv_page, bv->bv_len, bv->bv_offset);
}

/* @len bytes of compressed data, or what its folio holds of them */
static struct bio_vec z_erofs_dio_in_bvec(struct page *page, unsigned int len)
{
	struct folio *folio = page_folio(page);
	size_t ofs = folio_page_idx(folio, page) << PAGE_SHIFT;
	struct bio_vec bv;

	bvec_set_page(&bv, page, min_t(size_t, len, folio_size(folio) - ofs), 0);
	return bv;
}

/* Read the blocks of a pcluster */
static void z_erofs_dio_read(struct z_erofs_dio_window *w,
			     struct z_erofs_dio_extent *e)
{
	unsigned int ofs = erofs_blkoff(w->inode->i_sb, e->pa);
	unsigned int len = round_up(ofs + e->plen, i_blocksize(w->inode));
	struct erofs_map_dev mdev = { .m_pa = e->pa - ofs };
	struct page **in = w->in + e->in;
	struct bio_vec bv;
	unsigned int cur;

	/* no device id here, thus it will always succeed */
	(void)erofs_map_dev(w->inode->i_sb, &mdev);
	mdev.m_pa += mdev.m_dif->fsoff;
	for (cur = 0; cur < len; cur += bv.bv_len) {
		bv = z_erofs_dio_in_bvec(in[cur >> PAGE_SHIFT], len - cur);
		z_erofs_dio_read_bvec(w, &mdev, mdev.m_pa + cur, &bv);
	}
}

/* Read plain data to where it is wanted: the bios of the destination know that */
static void z_erofs_dio_read_plain(struct z_erofs_dio_window *w,
				   struct z_erofs_dio_extent *e)
{
	struct erofs_map_dev mdev = { .m_pa = e->pa };
	loff_t pos = w->pos, from, end;
	struct bio *dest, *bio;

	(void)erofs_map_dev(w->inode->i_sb, &mdev);
	mdev.m_pa += mdev.m_dif->fsoff;
	z_erofs_dio_submit(w);
	bio_list_for_each(dest, &w->bios) {
		from = max_t(loff_t, e->la, pos);
		end = min_t(loff_t, e->la + e->len, pos + dest->bi_iter.bi_size);
		if (from < end) {
			bio = bio_alloc_clone(mdev.m_bdev, dest, GFP_KERNEL,
					      &fs_bio_set);
			bio_trim(bio, (from - pos) >> SECTOR_SHIFT,
				 (end - from) >> SECTOR_SHIFT);
			bio->bi_iter.bi_sector =
				(mdev.m_pa + (from - e->la)) >> SECTOR_SHIFT;
			bio->bi_private = w;
			bio->bi_end_io = z_erofs_dio_endio;
			atomic_inc(&w->pending);
			submit_bio(bio);
		}
		pos += dest->bi_iter.bi_size;
	}
}

/* Take a private copy of compressed data that is kept among metadata */
static int z_erofs_dio_read_meta(struct z_erofs_dio_window *w,
				 struct z_erofs_dio_extent *e)
{
	struct erofs_buf buf = __EROFS_BUF_INITIALIZER;
	void *src;

	src = erofs_read_metabuf(&buf, w->inode->i_sb, e->pa,
				 erofs_inode_in_metabox(w->inode));
	if (IS_ERR(src))
		return PTR_ERR(src);
	memcpy_to_page(w->in[e->in], erofs_blkoff(w->inode->i_sb, e->pa), src,
		       e->plen);
	erofs_put_metabuf(&buf);
	return 0;
}

/*
 * Pages for compressed data, @left in all and @nr of the same pcluster: large
 * folios are cheaper to allocate and to read into, and LZ4 needs no mapping of
 * pages which follow each other.
 */
static struct folio *z_erofs_dio_alloc_folio(unsigned int left, unsigned int nr,
					     gfp_t gfp)
{
	struct folio *folio = NULL;

	nr = min3(max(nr, Z_EROFS_DIO_FOLIO), Z_EROFS_DIO_MAX_FOLIO, left);
	if (nr > 1)
		folio = folio_alloc(Z_EROFS_DIO_GFP_CHEAP, order_base_2(nr));
	return folio ?: folio_alloc(gfp, 0);
}

static void z_erofs_dio_unref_keep(struct z_erofs_dio_keep *k)
{
	if (refcount_dec_and_test(&k->ref)) {
		z_erofs_dio_drop_ahead(&k->ahead, k->ahead.nr);
		kfree(k);
	}
}

/* The file may have been closed, but the superblock waits for this */
static void z_erofs_dio_ahead_endio(struct bio *bio)
{
	struct z_erofs_dio_keep *k = bio->bi_private;
	struct erofs_sb_info *sbi = k->sbi;

	k->ahead.status = bio->bi_status;
	bio_put(bio);
	complete_all(&k->ahead.done);
	z_erofs_dio_unref_keep(k);
	if (atomic_dec_and_test(&sbi->dio_ahead))
		wake_up_var(&sbi->dio_ahead);
}

/*
 * Drop what has been read ahead in front of @pa on @dif, where a request has
 * ended, or all of it if @pa isn't there: then begin anew.  Extents may be
 * anywhere on the device: after each run of pages of which none was used, twice
 * as many requests don't guess.  False for one that is late: others have
 * been there already.
 */
static bool z_erofs_dio_aim_ahead(struct z_erofs_dio_ahead *a,
				  struct erofs_device_info *dif,
				  erofs_off_t pa, bool async)
{
	loff_t ofs = pa - a->pa;

	if (a->dif == dif && ofs < 0 && ofs > -Z_EROFS_DIO_AHEAD && async)
		return false;
	if (a->dif == dif && ofs >= 0 && ofs >> PAGE_SHIFT < a->nr) {
		z_erofs_dio_drop_ahead(a, ofs >> PAGE_SHIFT);
		return true;
	}
	if (a->nr) {
		a->missed = a->used ? 0 : min(2 * a->missed + 1, 63U);
		a->wait = a->missed;
	}
	z_erofs_dio_drop_ahead(a, a->nr);
	a->dif = dif;
	a->pa = pa;
	return true;
}

/*
 * Read on behind @e, the last extent of a request, unless enough of it has been
 * read already.  It is nothing but a guess, so it must not cost any effort.
 */
static void z_erofs_dio_read_ahead(struct z_erofs_dio_window *w,
				   struct z_erofs_dio_extent *e)
{
	struct z_erofs_dio_ahead *a = &w->keep->ahead;
	struct super_block *sb = w->inode->i_sb;
	struct erofs_map_dev mdev = { .m_pa = e->pa };
	struct folio *folio;
	unsigned int nr, i;
	erofs_off_t pa;
	struct bio *bio;
	loff_t left;

	if (!completion_done(&a->done))
		return;
	z_erofs_dio_settle_ahead(a);
	(void)erofs_map_dev(sb, &mdev);
	/* extents which aren't aligned share blocks */
	pa = round_down(mdev.m_pa + e->plen, i_blocksize(w->inode));
	if (!z_erofs_dio_aim_ahead(a, mdev.m_dif, pa, w->req->async))
		return;
	pa = a->pa + mdev.m_dif->fsoff + ((erofs_off_t)a->nr << PAGE_SHIFT);
	left = min_t(loff_t, bdev_nr_bytes(mdev.m_bdev), mdev.m_dif->fsoff +
		     erofs_pos(sb, EROFS_SB(sb)->total_blocks)) - pa;
	if (a->nr > w->req->ahead / 2 || left < (loff_t)PAGE_SIZE)
		return;
	if (a->wait) {
		--a->wait;
		return;
	}
	if (!z_erofs_dio_may_keep(w->keep))
		return;

	nr = min_t(loff_t, w->req->ahead - a->nr, left >> PAGE_SHIFT);
	bio = bio_alloc(mdev.m_bdev, nr, REQ_OP_READ | REQ_RAHEAD,
			Z_EROFS_DIO_GFP_CHEAP);
	if (!bio)
		return;
	bio->bi_iter.bi_sector = pa >> SECTOR_SHIFT;
	bio->bi_ioprio = bio_list_peek(&w->bios)->bi_ioprio;
	bio_clone_blkg_association(bio, bio_list_peek(&w->bios));
	bio->bi_private = w->keep;
	bio->bi_end_io = z_erofs_dio_ahead_endio;
	for (; nr; nr -= folio_nr_pages(folio)) {
		folio = z_erofs_dio_alloc_folio(rounddown_pow_of_two(nr),
						e->inpages,
						Z_EROFS_DIO_GFP_CHEAP);
		if (!folio)
			break;
		for (i = 0; i < folio_nr_pages(folio); ++i)
			a->pages[a->nr++] = folio_page(folio, i);
		bio_add_folio_nofail(bio, folio, folio_size(folio), 0);
	}
	if (!bio->bi_vcnt) {
		bio_put(bio);
		return;
	}
	a->used = false;
	reinit_completion(&a->done);
	refcount_inc(&w->keep->ref);
	atomic_inc(&w->keep->sbi->dio_ahead);
	submit_bio(bio);
}

/* The compressed pages of an extent, if all of them have been read ahead */
static bool z_erofs_dio_take_ahead(struct z_erofs_dio_window *w,
				   struct z_erofs_dio_extent *e)
{
	struct z_erofs_dio_ahead *a = &w->keep->ahead;
	struct erofs_map_dev mdev = { .m_pa = e->pa };
	erofs_off_t pa, nr;		/* it may be anywhere on the device */
	unsigned int i;

	(void)erofs_map_dev(w->inode->i_sb, &mdev);
	pa = round_down(mdev.m_pa, i_blocksize(w->inode));
	if (a->dif != mdev.m_dif || pa < a->pa)
		return false;
	nr = (pa - a->pa) >> PAGE_SHIFT;
	if (nr + e->inpages > a->nr)
		return false;
	if (nr + e->inpages > a->nr_read) {
		wait_for_completion_io(&a->done);
		z_erofs_dio_settle_ahead(a);
		if (!a->nr)
			return false;
	}
	a->used = true;
	for (i = 0; i < e->inpages; ++i, ++w->nr_in)
		z_erofs_dio_hold_page(w->in, w->nr_in, a->pages[nr + i]);
	return true;
}

/* In ascending order: extents which follow each other also do so in memory */
static int z_erofs_dio_alloc_in(struct z_erofs_dio_window *w)
{
	unsigned int nr = w->nr_in, room = 0, i = w->nr_ext, j;
	bool ahead = w->keep && w->keep->ahead.nr;
	struct z_erofs_dio_extent *e;
	struct page *page = NULL;
	struct folio *folio;

	w->nr_in = 0;
	w->in = kvmalloc_objs(*w->in, nr);
	if (!w->in)
		return -ENOMEM;
	while (i--) {
		e = &w->ext[i];
		e->in = w->nr_in;
		if (ahead && e->inpages && !(e->flags & EROFS_MAP_META)) {
			e->ahead = z_erofs_dio_take_ahead(w, e);
			ahead = e->ahead;
		}
		if (e->ahead)
			continue;
		/* don't split what a folio of its own can hold */
		if (room < e->inpages && e->inpages <= Z_EROFS_DIO_MAX_FOLIO)
			room = 0;
		for (j = 0; j < e->inpages; ++j, --room, ++page, ++w->nr_in) {
			if (room) {
				z_erofs_dio_hold_page(w->in, w->nr_in, page);
				continue;
			}
			folio = z_erofs_dio_alloc_folio(nr - w->nr_in,
							e->inpages - j,
							GFP_KERNEL);
			if (!folio)
				return -ENOMEM;
			page = folio_page(folio, 0);
			room = folio_nr_pages(folio);
			w->in[w->nr_in] = page;
		}
	}
	return 0;
}

static void z_erofs_dio_free_in(struct z_erofs_dio_window *w)
{
	z_erofs_dio_put_pages(w->in, w->nr_in);
	kvfree(w->in);
	w->in = NULL;
	w->nr_in = 0;
	w->nr_ext = 0;
}

/* Submit reads of all compressed data */
static int z_erofs_dio_read_in(struct z_erofs_dio_window *w)
{
	unsigned int i = w->nr_ext;
	struct z_erofs_dio_extent *e;
	int err;

	err = z_erofs_dio_alloc_in(w);
	while (!err && i--) {
		e = &w->ext[i];
		if (e->plain) {
			z_erofs_dio_read_plain(w, e);
		} else if (e->flags & EROFS_MAP_META) {
			/* it may have to be read: not with a bio at hand */
			z_erofs_dio_submit(w);
			err = z_erofs_dio_read_meta(w, e);
		} else if (e->inpages && !e->ahead) {
			z_erofs_dio_read(w, e);
		}
	}
	if (err)
		return err;
	z_erofs_dio_submit(w);
	if (w->keep && w->req->ahead && w->nr_ext && w->ext->inpages &&
	    !(w->ext->flags & EROFS_MAP_META) &&
	    w->ext->la + w->ext->len >= w->req->end)
		z_erofs_dio_read_ahead(w, w->ext);
	return 0;
}

static void z_erofs_dio_put_req(struct z_erofs_dio_req *rq)
{
	if (refcount_dec_and_test(&rq->ref))
		kfree(rq);
}

static void z_erofs_dio_free_window(struct z_erofs_dio_window *w)
{
	erofs_release_pages(&w->pagepool);
	if (is_vmalloc_addr(w->dest.addr))
		vm_unmap_ram(w->dest.addr, w->dest.nr_pages);
	kvfree(w->dest.pages);
	kvfree(w->dest.segs);
	if (w->counted)
		up(&EROFS_I_SB(w->inode)->dio_workers->windows);
	z_erofs_dio_put_req(w->req);
	kvfree(w);
}

/* True if current is the owner now, for whom windows wait */
static bool z_erofs_dio_begin_turn(struct z_erofs_dio_keep *k)
{
	lockdep_assert_held(&k->lock);
	if (test_and_set_bit_lock(0, &k->busy))
		return false;
	k->turns = true;
	return true;
}

/*
 * True if @w can go on, with w->keep or, if its owner must not be waited for,
 * without.  False if it waits for its turn: it may be gone already.  Nobody is
 * overtaken more than 8 times.
 */
static bool z_erofs_dio_take_turn(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_keep *k = w->keep;
	struct z_erofs_dio_window *prev;
	struct list_head *at;

	guard(spinlock)(&k->lock);
	if (z_erofs_dio_begin_turn(k))
		return true;
	if (!k->turns) {
		w->keep = NULL;
		return true;
	}
	list_for_each_prev(at, &k->waiting) {
		prev = list_entry(at, struct z_erofs_dio_window, link);
		if (prev->pos <= w->pos || ++prev->overtaken > 8)
			break;
	}
	list_add(&w->link, at);
	return false;
}

/* What is kept has been used for the bytes in front of @next */
static void z_erofs_dio_used_keep(struct z_erofs_dio_keep *k,
				  struct inode *inode, loff_t next)
{
	unsigned int nr;

	k->next = next;
	if (k->next >= i_size_read(inode)) {
		vfree(z_erofs_dio_drop(k));
		if (completion_done(&k->ahead.done))
			z_erofs_dio_drop_ahead(&k->ahead, k->ahead.nr);
	}
	nr = k->nr_pages + k->ahead.nr;
	if (nr != k->nr) {
		spin_lock(&z_erofs_dio_kept_lock);
		z_erofs_dio_account(k, nr);
		spin_unlock(&z_erofs_dio_kept_lock);
	}
}

/* Fill a window in line, if it needs nothing but what is kept: to be ended */
static bool z_erofs_dio_serve_kept(struct z_erofs_dio_window *w,
				   struct z_erofs_dio_keep *k,
				   struct bio_list *filled)
{
	loff_t pos = w->pos;
	struct bvec_iter bi;
	struct bio_vec bv;
	struct bio *bio;
	unsigned int n;

	if (pos < k->pos || w->end > k->end)
		return false;
	bio_list_for_each(bio, &w->bios) {
		bio_for_each_segment(bv, bio, bi) {
			n = min_t(loff_t, bv.bv_len, w->end - pos);
			memcpy_to_page(bv.bv_page, bv.bv_offset,
				       z_erofs_dio_kept_addr(k, pos), n);
			pos += n;
		}
	}
	z_erofs_dio_used_keep(k, w->inode, w->req->end);
	bio_list_merge(filled, &w->bios);
	z_erofs_dio_free_window(w);
	return true;
}

/*
 * Those in line that only need a copy get it here: without a slot, or a worker.
 * The first of the others goes on.
 */
static void z_erofs_dio_pass_turn(struct z_erofs_dio_keep *k)
{
	struct bio_list filled = BIO_EMPTY_LIST;
	struct z_erofs_dio_window *next;
	struct bio *bio;

	do {
		spin_lock(&k->lock);
		next = list_first_entry_or_null(&k->waiting,
						struct z_erofs_dio_window, link);
		if (next) {
			list_del(&next->link);
		} else {
			k->turns = false;
			clear_bit_unlock(0, &k->busy);
		}
		spin_unlock(&k->lock);
	} while (next && z_erofs_dio_serve_kept(next, k, &filled));
	if (next && z_erofs_dio_get_slot(next))
		z_erofs_dio_queue_work(next);
	/* not before, or those who get them could be back in line */
	while ((bio = bio_list_pop(&filled)))
		bio_endio(bio);
}

static void z_erofs_dio_end_turn(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_keep *k = w->keep;

	z_erofs_dio_used_keep(k, w->inode, w->req->end);
	w->keep = NULL;
	z_erofs_dio_pass_turn(k);
}

/*
 * Stage as many of the last extents before w->rest as are allowed.  True if the
 * caller can go on with z_erofs_dio_unstage(): it failed, or nothing has to be
 * read.  Otherwise the last bio completes w->done, or queues the work of an
 * asynchronous request: then @w may be gone already.
 */
static bool z_erofs_dio_stage(struct z_erofs_dio_window *w)
{
	atomic_set(&w->pending, 1);
	if (!w->dest.nr_segs) {
		w->err = z_erofs_dio_gather(w);
		if (!w->err)
			z_erofs_dio_copy_kept(w);
	}
	if (!w->err)
		w->err = z_erofs_dio_map(w);
	if (!w->err)
		w->err = z_erofs_dio_read_in(w);
	/* if it is going to keep nothing, nobody needs to wait for it */
	if (w->keep && w->req->async && w->rest <= w->start &&
	    !(w->nr_ext && w->ext->keep))
		z_erofs_dio_end_turn(w);
	if (!atomic_dec_and_test(&w->pending))
		return false;
	if (!w->req->async)
		complete(&w->done);
	return true;
}

static int z_erofs_dio_fragment(struct z_erofs_dio_window *w,
				struct z_erofs_dio_extent *e)
{
	struct inode *packed_inode = EROFS_I_SB(w->inode)->packed_inode;
	erofs_off_t pos = EROFS_I(w->inode)->z_fragmentoff + e->pa;
	struct erofs_buf buf = __EROFS_BUF_INITIALIZER;
	unsigned int cur, n;
	void *src;

	if (!packed_inode)
		return -EFSCORRUPTED;

	buf.mapping = packed_inode->i_mapping;
	for (cur = 0; cur < e->len; cur += n) {
		src = erofs_bread(&buf, pos + cur, true);
		if (IS_ERR(src)) {
			erofs_put_metabuf(&buf);
			return PTR_ERR(src);
		}
		n = min_t(unsigned int, e->len - cur,
			  PAGE_SIZE - offset_in_page(pos + cur));
		z_erofs_dio_copy(&w->dest, e->la + cur, src, n);
	}
	erofs_put_metabuf(&buf);
	return 0;
}

static bool z_erofs_dio_is_direct(const struct z_erofs_dio_layout *lo,
				  unsigned int i)
{
	return i >= lo->direct && i < lo->edirect;
}

/* Copy what is wanted from the kernel pages and let go of them */
static void z_erofs_dio_put_out(struct z_erofs_dio_window *w,
				struct z_erofs_dio_extent *e,
				const struct z_erofs_dio_layout *lo,
				struct page **out, bool copy,
				struct page **pool)
{
	loff_t from = max_t(loff_t, e->la, w->start);
	loff_t pos = (loff_t)e->la - lo->pageofs, cur, end;
	unsigned int i;

	for (i = 0; i < lo->nr; ++i, pos += PAGE_SIZE) {
		/* neither those in use once more, see z_erofs_dio_get_out() */
		if (!out[i] || z_erofs_dio_is_direct(lo, i) ||
		    (i >= Z_EROFS_DIO_LZ4_PAGES &&
		     out[i] == out[i - Z_EROFS_DIO_LZ4_PAGES]))
			continue;
		cur = max(pos, from);
		end = min3(pos + (loff_t)PAGE_SIZE, (loff_t)e->la + e->len,
			   w->end);
		if (copy && cur < end)
			z_erofs_dio_copy_page(&w->dest, cur, out[i],
					      cur - pos, end - cur);
		if (i < lo->kept)
			erofs_pagepool_add(pool, out[i]);
	}
	if (lo->kept)
		kvfree(out);
}

/* How many pages of an extent are in front of the first byte that is wanted */
static unsigned int z_erofs_dio_gap(struct z_erofs_dio_window *w,
				    struct z_erofs_dio_extent *e,
				    const struct z_erofs_dio_layout *lo)
{
	unsigned int skip = e->la < w->start ? w->start - e->la : 0;

	return (lo->pageofs + skip) >> PAGE_SHIFT;
}

/*
 * Get the page list for an extent which can't do with destination pages alone.
 * Plain data and MicroLZMA skip pages without any wanted byte, the others need
 * something to write to, and LZ4 to find matches in; as it only looks back so
 * far, few pages do for all that is in front of the wanted bytes.
 */
static struct page **z_erofs_dio_get_out(struct z_erofs_dio_window *w,
					 struct z_erofs_dio_extent *e,
					 const struct z_erofs_dio_layout *lo,
					 struct page **pool)
{
	unsigned int gap = z_erofs_dio_gap(w, e, lo), i = 0;
	struct page **out;

	if (!lo->kept)
		return w->keep->pages;
	out = kvzalloc_objs(*out, lo->nr);
	if (!out)
		return NULL;
	if (e->alg == Z_EROFS_COMPRESSION_SHIFTED ||
	    e->alg == Z_EROFS_COMPRESSION_INTERLACED ||
	    e->alg == Z_EROFS_COMPRESSION_LZMA)
		i = gap;
	for (; i < lo->nr; ++i) {
		if (z_erofs_dio_is_direct(lo, i))
			out[i] = w->dest.pages[lo->page + i - lo->direct];
		else if (i >= lo->kept)
			out[i] = w->keep->pages[i - lo->kept];
		else if (i >= Z_EROFS_DIO_LZ4_PAGES && i < gap &&
			 !cpu_dcache_is_aliasing())
			out[i] = out[i - Z_EROFS_DIO_LZ4_PAGES];
		else
			out[i] = __erofs_allocpage(pool, GFP_KERNEL, true);
		if (!out[i]) {
			z_erofs_dio_put_out(w, e, lo, out, false, pool);
			return NULL;
		}
	}
	return out;
}

/* Just decode what has been asked for */
static void z_erofs_dio_dont_keep(struct z_erofs_dio_window *w,
				  struct z_erofs_dio_extent *e)
{
	w->keep->end = 0;
	e->keep = false;
	e->partial = true;
	e->len = w->end - e->la;
}

/* An extent of which something is kept is decoded where no user sees it */
static void z_erofs_dio_lay_keep(struct z_erofs_dio_window *w,
				 struct z_erofs_dio_extent *e,
				 struct z_erofs_dio_layout *lo)
{
	struct z_erofs_dio_keep *k = w->keep;

	z_erofs_dio_lay_aside(e->la, e->len, lo);
	lo->kept = z_erofs_dio_gap(w, e, lo);
	if (!z_erofs_dio_make_room(k, lo->nr - lo->kept)) {
		z_erofs_dio_dont_keep(w, e);
		return;
	}
	/* this is the end of a request: nobody looks there until it is done */
	k->pos = max_t(loff_t, e->la, (loff_t)e->la - lo->pageofs +
				      ((loff_t)lo->kept << PAGE_SHIFT));
	k->end = e->la + e->len;
}

static int z_erofs_dio_decode(struct z_erofs_dio_window *w,
			      struct z_erofs_dio_extent *e, struct page **pool)
{
	static DEFINE_RATELIMIT_STATE(rs, DEFAULT_RATELIMIT_INTERVAL,
				      DEFAULT_RATELIMIT_BURST);
	const struct z_erofs_decompressor *alg = z_erofs_decomp[e->alg];
	struct super_block *sb = w->inode->i_sb;
	struct z_erofs_dio_layout lo;
	unsigned int mask = 0;
	void *dst = NULL;
	const char *reason;
	struct page **out;
	bool aside;
	int err = 0;

	/* where the blocks of this format are depends on the page offset */
	if (e->alg == Z_EROFS_COMPRESSION_INTERLACED)
		mask = sb->s_blocksize - 1;
	if (e->keep)
		z_erofs_dio_lay_keep(w, e, &lo);
	if (!e->keep)
		z_erofs_dio_lay_out(&w->dest, e->la, e->len,
				    max_t(loff_t, e->la, w->start), mask, &lo);
	aside = lo.direct || lo.edirect < lo.nr;
	if (aside)
		out = z_erofs_dio_get_out(w, e, &lo, pool);
	else
		out = w->dest.pages + lo.page;
	if (!out)
		return -ENOMEM;
	if (!lo.kept)
		dst = w->keep->addr;
	else if (!aside && w->dest.addr)
		dst = w->dest.addr + ((size_t)lo.page << PAGE_SHIFT);

	reason = alg->decompress(&(struct z_erofs_decompress_req) {
				.sb = sb,
				.in = w->in + e->in,
				.out = out,
				.dst = dst,
				.inpages = e->inpages,
				.outpages = lo.nr,
				.pageofs_in = erofs_blkoff(sb, e->pa),
				.pageofs_out = lo.pageofs,
				.inputsize = e->plen,
				.outputsize = e->len,
				.alg = e->alg,
				.partial_decoding = e->partial,
				.gfp = GFP_KERNEL,
			 }, pool);
	if (reason) {
		err = IS_ERR(reason) ? PTR_ERR(reason) : -EFSCORRUPTED;
		/* without what goes beyond the window, it is tried again */
		if (err != -ENOMEM && !e->keep && __ratelimit(&rs))
			erofs_err(sb, "failed to decompress (%s) %s @ pa %llu size %u => %u of nid %llu",
				  alg->name,
				  IS_ERR(reason) ? "error" : reason, e->pa,
				  e->plen, e->len, EROFS_I(w->inode)->nid);
	}
	if (aside)
		z_erofs_dio_put_out(w, e, &lo, out, !err, pool);
	return err;
}

static int z_erofs_dio_fill(struct z_erofs_dio_window *w,
			    struct z_erofs_dio_extent *e, struct page **pool)
{
	int err;

	if (e->plain)
		return 0;
	if (e->flags & EROFS_MAP_FRAGMENT)
		return z_erofs_dio_fragment(w, e);
	if (!(e->flags & EROFS_MAP_MAPPED)) {
		z_erofs_dio_copy(&w->dest, e->la, NULL, e->len);
		return 0;
	}
	err = z_erofs_dio_decode(w, e, pool);
	if (err && e->keep) {
		/* it may be what nobody has asked for */
		z_erofs_dio_dont_keep(w, e);
		err = z_erofs_dio_decode(w, e, pool);
	}
	return err;
}

/*
 * Fill extents until all have been taken.  Two of them may share a page, but no
 * byte: each is written by one CPU only.
 */
static void z_erofs_dio_fill_some(struct z_erofs_dio_window *w,
				  struct page **pool)
{
	int i, err;

	while (!READ_ONCE(w->err) && (i = atomic_dec_return(&w->todo)) >= 0) {
		err = z_erofs_dio_fill(w, &w->ext[i], pool);
		if (err)
			cmpxchg(&w->err, 0, err);
	}
}

static void z_erofs_dio_help(struct work_struct *work)
{
	struct z_erofs_dio_window *w =
		container_of(work, struct z_erofs_dio_helper, work)->w;
	unsigned int noio = memalloc_noio_save();
	struct page *pool = NULL;

	z_erofs_dio_fill_some(w, &pool);
	erofs_release_pages(&pool);
	memalloc_noio_restore(noio);
	if (atomic_dec_and_test(&w->busy))
		complete(&w->helped);
}

/*
 * LZ4 needs its output in one piece.  Unless most of it is anyway, map it once
 * rather than by extent; without any memory for that, extents do it on their own.
 */
static void z_erofs_dio_map_dest(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_dest *d = &w->dest;

	/* caches must not see the same page at two addresses at a time */
	if (d->addr || !w->lz4 || cpu_dcache_is_aliasing())
		return;
	if (d->nr_runs == 1 && !PageHighMem(d->pages[d->nr_pages - 1]))
		/* neighbours may have been allocated with other tags */
		d->addr = kasan_reset_tag(page_address(d->pages[0]));
	else if (w->nr_ext > 1 && d->nr_runs > d->nr_pages / 16 + 1)
		d->addr = erofs_vm_map_ram(d->pages, d->nr_pages);
}

/*
 * Share what is staged out to other CPUs.  They are chosen here, since workers
 * which may run anywhere tend to be woken where this is running: on few CPUs a
 * busy one is enough for the scheduler not to look for others.  Only those which
 * current may use itself are asked, and those which are too busy to begin until
 * nothing is left are not waited for.
 */
static void z_erofs_dio_fill_all(struct z_erofs_dio_window *w)
{
	unsigned int here = raw_smp_processor_id(), nr = 0, max, cpu;

	if (w->err || !w->nr_ext)
		return;
	z_erofs_dio_map_dest(w);
	max = min3((u32)(w->end - w->pos) / Z_EROFS_DIO_HELP, w->nr_ext - 1,
		   Z_EROFS_DIO_MAX_HELPERS);
	atomic_set(&w->todo, w->nr_ext);
	atomic_set(&w->busy, 1);
	init_completion(&w->helped);
	for_each_cpu_wrap(cpu, current->cpus_ptr, here) {
		if (nr == max)
			break;
		if (cpu == here || !cpu_online(cpu))
			continue;
		atomic_inc(&w->busy);
		w->helper[nr].w = w;
		INIT_WORK(&w->helper[nr].work, z_erofs_dio_help);
		queue_work_on(cpu, z_erofs_dio_helpers, &w->helper[nr].work);
		++nr;
	}
	z_erofs_dio_fill_some(w, &w->pagepool);
	while (nr--)
		if (cancel_work(&w->helper[nr].work))
			atomic_dec(&w->busy);
	if (!atomic_dec_and_test(&w->busy))
		wait_for_completion(&w->helped);
}

/*
 * In-place I/O and decompression in the page cache make progress without any
 * further memory, and what is copied from there is final.
 */
static int z_erofs_dio_fill_cached(struct z_erofs_dio_window *w)
{
	struct bvec_iter bi;
	struct iov_iter to;
	struct kiocb iocb;
	struct bio_vec bv;
	struct bio *bio;
	ssize_t ret;

	/* the flags of the file (O_DIRECT) aren't wanted */
	init_sync_kiocb(&iocb, w->req->file);
	iocb.ki_flags = w->end - w->pos >= Z_EROFS_DIO_DONTCACHE ?
			IOCB_DONTCACHE : 0;
	iocb.ki_pos = w->pos;
	bio_list_for_each(bio, &w->bios) {
		/* not page by page: each call drops the folios it has read */
		iov_iter_bvec(&to, ITER_DEST, bio->bi_io_vec,
			      bio_segments(bio), bio->bi_iter.bi_size);
		to.iov_offset = bio->bi_iter.bi_offset;
		while (iov_iter_count(&to) && iocb.ki_pos < w->end) {
			ret = filemap_read(&iocb, &to, 0);
			if (ret <= 0)
				return ret ?: -EIO;
		}
		bio_for_each_segment(bv, bio, bi)
			flush_dcache_page(bv.bv_page);
	}
	return 0;
}

/* Fill what has been staged; true if there is more to come */
static bool z_erofs_dio_unstage(struct z_erofs_dio_window *w)
{
	if (!w->err)
		w->err = blk_status_to_errno(w->status);
	z_erofs_dio_fill_all(w);
	z_erofs_dio_free_in(w);
	if (w->err || w->rest <= w->start)
		return false;
	/* the worst of images have a million stages in a window */
	if (fatal_signal_pending(current)) {
		w->err = -EINTR;
		return false;
	}
	erofs_release_pages(&w->pagepool);
	return true;
}

/* Why a window which failed like this may yet be read in another way */
static enum z_erofs_dio_path z_erofs_dio_reason(int err)
{
	switch (err) {
	case -ENOMEM:
		return Z_EROFS_DIO_NOMEM;
	case -ENOTBLK:
		return Z_EROFS_DIO_PRIVATE;
	case -EEXIST:
		return Z_EROFS_DIO_OVERLAP;
	case -EINVAL:
		return Z_EROFS_DIO_MISALIGNED;
	}
	return Z_EROFS_DIO_DIRECT;
}

/* All has been filled, or something failed */
static void z_erofs_dio_end(struct z_erofs_dio_window *w)
{
	enum z_erofs_dio_path path = z_erofs_dio_reason(w->err);
	struct bio_list bios = w->bios;
	blk_status_t status = BLK_STS_OK;
	struct bio *bio;
	unsigned int i;
	int err = w->err;

	if (path != Z_EROFS_DIO_DIRECT) {
		trace_erofs_dio_read(w->inode, w->pos, w->end - w->pos, path);
		err = z_erofs_dio_fill_cached(w);
	}
	/* as if it were buffered: no other error is expected by callers */
	if (err)
		status = err == -ENOMEM ? BLK_STS_RESOURCE : BLK_STS_IOERR;
	/* who is killed doesn't see this one, nor is it one of the filesystem */
	if (err == -EINTR || err == -ERESTARTSYS)
		status = BLK_STS_AGAIN;
	for (i = 0; i < w->dest.nr_pages; ++i)
		flush_dcache_page(w->dest.pages[i]);
	if (w->req->async && w->keep)
		z_erofs_dio_end_turn(w);
	if (w->req->async)
		z_erofs_dio_put_slot(w);
	/*
	 * As late as possible: the work of a new window at this address would
	 * be taken for the one that is running, and wait for it.
	 */
	z_erofs_dio_free_window(w);

	while ((bio = bio_list_pop(&bios)))
		bio_endio_status(bio, status);
}

static void z_erofs_dio_work(struct work_struct *work)
{
	struct z_erofs_dio_window *w =
		container_of(work, struct z_erofs_dio_window, work);
	/* reclaim may wait for the submitter, who can be a block device */
	unsigned int noio = memalloc_noio_save();

	/* if its turn has just come, nothing is staged yet, nor to be filled */
	while (z_erofs_dio_unstage(w)) {
		/* the last bio will queue this work again, or has done so */
		if (!z_erofs_dio_stage(w))
			goto out;
	}
	z_erofs_dio_end(w);
out:
	memalloc_noio_restore(noio);
}

/* End the staged window of a synchronous request; @next takes its place */
static void z_erofs_dio_end_staged(struct z_erofs_dio_req *rq,
				   struct z_erofs_dio_window *next)
{
	struct z_erofs_dio_window *w = rq->staged;

	rq->staged = next;
	if (!w)
		return;
	for (;;) {
		wait_for_completion_io(&w->done);
		if (!z_erofs_dio_unstage(w))
			break;
		reinit_completion(&w->done);
		z_erofs_dio_stage(w);
	}
	z_erofs_dio_end(w);
	cond_resched();
}

/* While a window is decoded here, the device is to read for the next one */
static void z_erofs_dio_queue_sync(struct z_erofs_dio_window *w)
{
	struct blk_plug *plug = current->plug;

	init_completion(&w->done);
	z_erofs_dio_stage(w);
	/* .. so don't leave it in a plug; modules can't use blk_flush_plug() */
	if (plug) {
		blk_finish_plug(plug);
		blk_start_plug(plug);
	}
	z_erofs_dio_end_staged(w->req, w);
}

static void z_erofs_dio_queue_async(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_workers *p = EROFS_I_SB(w->inode)->dio_workers;
	unsigned int noio;

	/* others wait for devices only: neither for this one nor in a fault */
	w->counted = !down_killable(&p->windows);
	INIT_WORK(&w->work, z_erofs_dio_work);
	if ((w->keep && !z_erofs_dio_take_turn(w)) || !z_erofs_dio_get_slot(w))
		return;
	/* others may wait until it is done, and reclaim for them */
	noio = memalloc_noio_save();
	/* whose turn it is leaves all to a worker: there is more to be submitted */
	if (w->keep || z_erofs_dio_stage(w))
		z_erofs_dio_queue_work(w);
	memalloc_noio_restore(noio);
}

static int z_erofs_dio_iomap_begin(struct inode *inode, loff_t pos,
				   loff_t length, unsigned int flags,
				   struct iomap *iomap, struct iomap *srcmap)
{
	struct iomap_iter *iter = container_of(iomap, struct iomap_iter, iomap);
	struct erofs_map_blocks map = {
		.buf = __EROFS_BUF_INITIALIZER,
		.m_la = pos + Z_EROFS_DIO_WINDOW,
	};
	struct block_device *bdev = erofs_dio_bdev(inode);
	/* those of the device below an image can be larger */
	unsigned int bs = max(i_blocksize(inode), erofs_dio_unit(bdev));
	struct z_erofs_dio_window *w;
	unsigned int nr;
	loff_t end;
	int err;

	/* iomap ends the request here; read_iter() goes on, or gives up */
	if (fatal_signal_pending(current))
		return -ENOTBLK;

	if (length > Z_EROFS_DIO_WINDOW) {
		end = map.m_la;
		err = z_erofs_map_blocks_iter(inode, &map, 0);
		if (!err && map.m_la <= pos)
			err = z_erofs_map_blocks_iter(inode, &map,
						      EROFS_GET_BLOCKS_FIEMAP);
		/* errors are reported when the extent is due */
		if (!err && (map.m_flags & EROFS_MAP_MAPPED))
			end = z_erofs_dio_cut(pos, map.m_la,
					      map.m_la + map.m_llen, bs);
		erofs_put_metabuf(&map.buf);
		length = min(length, end - pos);
	}

	nr = min_t(u64, (length >> inode->i_blkbits) + 2,
		   Z_EROFS_DIO_MAX_EXTENTS);
	w = kvzalloc_flex(*w, ext, nr, GFP_KERNEL_ACCOUNT);
	if (!w)
		return -ENOTBLK;
	w->max_ext = nr;
	w->req = iter->private;
	refcount_inc(&w->req->ref);
	w->keep = w->req->keep;
	w->inode = inode;
	w->pos = pos;
	w->start = pos;

	/* the device is only asked for its limits and never sees these bios */
	iomap->bdev = bdev;
	iomap->addr = IOMAP_NULL_ADDR;
	iomap->type = IOMAP_MAPPED;
	iomap->offset = pos;
	iomap->length = length;
	iomap->private = w;
	return 0;
}

static void z_erofs_dio_submit_io(const struct iomap_iter *iter,
				  struct bio *bio, loff_t pos)
{
	struct z_erofs_dio_window *w = iter->iomap.private;

	bio_list_add(&w->bios, bio);
	w->end = min(pos + bio->bi_iter.bi_size, i_size_read(w->inode));
	w->rest = w->end;
}

static int z_erofs_dio_iomap_end(struct inode *inode, loff_t pos,
				 loff_t length, ssize_t written,
				 unsigned int flags, struct iomap *iomap)
{
	struct z_erofs_dio_window *w = iomap->private;

	if (bio_list_empty(&w->bios))
		z_erofs_dio_free_window(w);
	else if (w->req->async)
		z_erofs_dio_queue_async(w);
	else
		z_erofs_dio_queue_sync(w);
	return 0;
}

static int z_erofs_dio_iomap_next(const struct iomap_iter *iter,
				  struct iomap *iomap, struct iomap *srcmap)
{
	struct z_erofs_dio_req *rq = iter->private;
	int ret;

	ret = iomap_iter_next(iter, iomap, srcmap, z_erofs_dio_iomap_begin,
			      z_erofs_dio_iomap_end);
	/* iomap is going to wait for bios: nobody else would end them */
	if (ret <= 0)
		z_erofs_dio_end_staged(rq, NULL);
	return ret;
}

static const struct iomap_ops z_erofs_dio_iomap_ops = {
	.iomap_next = z_erofs_dio_iomap_next,
};

static const struct iomap_dio_ops z_erofs_dio_ops = {
	.submit_io = z_erofs_dio_submit_io,
	/*
	 * A window holds all its bios until it is done.  With those of
	 * fs_bio_set, others would have to wait for it if there is no memory.
	 */
	.bio_set = &z_erofs_dio_bioset,
};

/*
 * Workers wait for data of images and devices below, which can be compressed
 * files of other superblocks.  With one workqueue for all of them, workers could
 * take the places of those they wait for.  Few superblocks ever need one.
 */
static bool z_erofs_dio_get_workers(struct super_block *sb)
{
	struct z_erofs_dio_workers **p = &EROFS_SB(sb)->dio_workers, *new;

	if (READ_ONCE(*p))
		return true;
	new = kmalloc_obj(*new);
	if (!new)
		return false;
	*new = (struct z_erofs_dio_workers) {
		.wq = alloc_workqueue("erofs_dio/%s", WQ_UNBOUND | WQ_HIGHPRI |
				      WQ_MEM_RECLAIM, num_possible_cpus(),
				      sb->s_id),
		.waiting = LIST_HEAD_INIT(new->waiting),
	};
	sema_init(&new->windows, Z_EROFS_DIO_MAX_WINDOWS);
	spin_lock_init(&new->lock);
	if (new->wq && !cmpxchg(p, NULL, new))
		return true;
	if (new->wq)
		destroy_workqueue(new->wq);
	kfree(new);
	return READ_ONCE(*p);
}

/**
 * z_erofs_dio_exit_super - end what direct reads do behind their callers
 * @sbi: of a superblock without any file that is open
 *
 * Context: Process context, waits for workers which return, and for what is
 * being read ahead.
 */
void z_erofs_dio_exit_super(struct erofs_sb_info *sbi)
{
	if (sbi->dio_workers) {
		destroy_workqueue(sbi->dio_workers->wq);
		kfree(sbi->dio_workers);
	}
	wait_var_event(&sbi->dio_ahead, !atomic_read(&sbi->dio_ahead));
}

/**
 * z_erofs_dio_init - set up what all direct reads share
 *
 * Context: Process context, when EROFS is initialised.
 * Return: 0, or -ENOMEM.
 */
int __init z_erofs_dio_init(void)
{
	int err;

	err = bioset_init(&z_erofs_dio_bioset, BIO_POOL_SIZE, 0,
			  BIOSET_NEED_BVECS);
	if (err)
		return err;
	z_erofs_dio_helpers = alloc_workqueue("erofs_dio_helper",
					      WQ_PERCPU | WQ_HIGHPRI |
					      WQ_CPU_INTENSIVE, 0);
	if (!z_erofs_dio_helpers)
		goto err_workqueue;
	z_erofs_dio_shrinker = shrinker_alloc(0, "erofs-dio");
	if (!z_erofs_dio_shrinker)
		goto err_shrinker;
	z_erofs_dio_shrinker->count_objects = z_erofs_dio_shrink_count;
	z_erofs_dio_shrinker->scan_objects = z_erofs_dio_shrink_scan;
	shrinker_register(z_erofs_dio_shrinker);
	return 0;

err_shrinker:
	destroy_workqueue(z_erofs_dio_helpers);
err_workqueue:
	bioset_exit(&z_erofs_dio_bioset);
	return -ENOMEM;
}

/**
 * z_erofs_dio_exit - undo z_erofs_dio_init()
 *
 * Context: Process context, when no file of EROFS is open any more.
 */
void z_erofs_dio_exit(void)
{
	shrinker_free(z_erofs_dio_shrinker);
	destroy_workqueue(z_erofs_dio_helpers);
	bioset_exit(&z_erofs_dio_bioset);
}

/*
 * A bio that can't hold a logical block of the vector makes iomap fail, so each
 * part has to be a multiple of it.  They must not overlap: the last one wins if
 * they are filled one after the other, but an LZ4 extent needs all its output
 * until it is done.  Pages of one window are compared later, see
 * z_erofs_dio_check_repeats().
 */
static enum z_erofs_dio_path z_erofs_dio_vector(const struct iov_iter *to,
						unsigned int mask)
{
	const struct iovec *iov, *prev;
	void __user *top = NULL;
	void __user *end;
	unsigned int i, j;

	if (!iter_is_iovec(to))
		return Z_EROFS_DIO_DIRECT;
	for (i = 0; i < to->nr_segs; ++i) {
		iov = iter_iov(to) + i;
		if (iov->iov_len & mask)
			return Z_EROFS_DIO_MISALIGNED;
		end = iov->iov_base + iov->iov_len;
		/* in ascending order, there is nothing to compare with */
		for (j = iov->iov_base < top ? i : 0; j--;) {
			prev = iter_iov(to) + j;
			if (iov->iov_base < prev->iov_base + prev->iov_len &&
			    prev->iov_base < end)
				return Z_EROFS_DIO_OVERLAP;
		}
		if (top < end)
			top = end;
	}
	return Z_EROFS_DIO_DIRECT;
}

/* The one place which decides whether a request is served directly */
static enum z_erofs_dio_path z_erofs_dio_path(struct kiocb *iocb,
					      struct iov_iter *to)
{
	struct block_device *bdev = erofs_dio_bdev(file_inode(iocb->ki_filp));
	unsigned int mask;

	if (!bdev)
		return Z_EROFS_DIO_NO_BDEV;
	mask = erofs_dio_unit(bdev) - 1;
	if ((iocb->ki_pos | iov_iter_count(to)) & mask)
		return Z_EROFS_DIO_MISALIGNED;
	if (iov_iter_alignment(to) & bdev_dma_alignment(bdev))
		return Z_EROFS_DIO_MISALIGNED;
	return z_erofs_dio_vector(to, mask);
}

/*
 * The one request at a time which may use what is kept, and keep more, or
 * whose windows are going to wait for that.
 */
static struct z_erofs_dio_keep *z_erofs_dio_get_keep(struct kiocb *iocb,
						     size_t count, bool async)
{
	struct file *file = iocb->ki_filp;
	struct z_erofs_dio_keep *k, *old;
	loff_t came;

	/* what is kept is decoded and copied at different addresses */
	if (cpu_dcache_is_aliasing() || erofs_cache_file(file) != file ||
	    (async && count > Z_EROFS_DIO_TURN))
		return NULL;
	k = READ_ONCE(file->private_data);
	if (!k) {
		k = kzalloc_obj(*k, GFP_KERNEL_ACCOUNT);
		if (!k)
			return NULL;
		refcount_set(&k->ref, 1);
		k->sbi = EROFS_I_SB(file_inode(file));
		spin_lock_init(&k->lock);
		INIT_LIST_HEAD(&k->waiting);
		INIT_LIST_HEAD(&k->lru);
		init_completion(&k->ahead.done);
		complete_all(&k->ahead.done);
		old = cmpxchg(&file->private_data, NULL, k);
		if (old) {
			kfree(k);
			k = old;
		}
	}
	if (!async)
		return test_and_set_bit_lock(0, &k->busy) ? NULL : k;
	/* it is only a guess, as several CPUs may submit them */
	came = READ_ONCE(k->came);
	WRITE_ONCE(k->came, iocb->ki_pos + count);
	return abs(iocb->ki_pos - came) <= Z_EROFS_DIO_CLOSE ? k : NULL;
}

/**
 * z_erofs_dio_release - let go of what has been kept for a file
 * @inode: the inode of @file
 * @file: a file which isn't used by anybody any more
 *
 * Context: Process context, may sleep.
 * Return: 0.
 */
int z_erofs_dio_release(struct inode *inode, struct file *file)
{
	struct z_erofs_dio_keep *k = file->private_data;

	if (!k)
		return 0;
	scoped_guard(spinlock, &z_erofs_dio_kept_lock)
		z_erofs_dio_account(k, 0);
	vfree(k->addr);
	z_erofs_dio_unref_keep(k);
	return 0;
}

/* Serve a request that only needs what is kept */
static ssize_t z_erofs_dio_read_kept(struct kiocb *iocb, struct iov_iter *to,
				     struct z_erofs_dio_keep *k)
{
	loff_t pos = iocb->ki_pos;
	loff_t end = min_t(loff_t, pos + iov_iter_count(to),
			   i_size_read(file_inode(iocb->ki_filp)));
	ssize_t n;

	if (pos < k->pos || end > k->end)
		return 0;
	n = copy_to_iter(z_erofs_dio_kept_addr(k, pos), end - pos, to);
	iocb->ki_pos += n;
	return n ?: -EFAULT;
}

/* .. an asynchronous one, if that's possible at once: windows wait for it */
static ssize_t z_erofs_dio_try_kept(struct kiocb *iocb, struct iov_iter *to,
				    struct z_erofs_dio_keep *k)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	bool owner = false;
	ssize_t ret;

	if (!user_backed_iter(to))
		return 0;
	scoped_guard(spinlock, &k->lock)
		owner = z_erofs_dio_begin_turn(k);
	if (!owner)
		return 0;
	pagefault_disable();
	ret = max_t(ssize_t, z_erofs_dio_read_kept(iocb, to, k), 0);
	pagefault_enable();
	if (ret && iov_iter_count(to) && iocb->ki_pos < i_size_read(inode)) {
		/* it faults: its memory has to be pinned */
		iov_iter_revert(to, ret);
		iocb->ki_pos -= ret;
		ret = 0;
	}
	if (ret)
		z_erofs_dio_used_keep(k, inode, iocb->ki_pos);
	z_erofs_dio_pass_turn(k);
	return ret;
}

static ssize_t z_erofs_dio_direct(struct kiocb *iocb, struct iov_iter *to,
				  bool async, struct z_erofs_dio_keep *k)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	size_t cut = iov_iter_count(to);
	struct z_erofs_dio_req *rq;
	unsigned int bs;
	loff_t end;
	ssize_t ret;
	bool goes_on;

	rq = kmalloc_obj(*rq);
	if (!rq)
		return 0;

	/* an empty part in front is skipped, or its address could be refused */
	iov_iter_advance(to, 0);
	/* don't pin memory that nothing can be read into */
	bs = erofs_dio_unit(erofs_dio_bdev(inode));
	iov_iter_truncate(to, round_up(i_size_read(inode), bs) - iocb->ki_pos);
	cut -= iov_iter_count(to);
	end = min_t(loff_t, i_size_read(inode),
		    iocb->ki_pos + iov_iter_count(to));
	/* a reader who doesn't go on there isn't going to need any of it */
	goes_on = k && (async || k->next == iocb->ki_pos);
	if (k && !goes_on)
		vfree(z_erofs_dio_drop(k));
	*rq = (struct z_erofs_dio_req) {
		.file = erofs_cache_file(iocb->ki_filp),
		.keep = k,
		/* who begins with a small read may just have a look */
		.sequential = goes_on &&
			      (iocb->ki_pos || end >= Z_EROFS_DIO_DONTCACHE),
		.end = end,
		.async = async,
		.ref = REFCOUNT_INIT(1),
		.windows = LIST_HEAD_INIT(rq->windows),
	};
	if (rq->sequential && iocb->ki_pos &&
	    !erofs_is_fileio_mode(EROFS_I_SB(inode)) &&
	    i_blocksize(inode) == PAGE_SIZE)
		rq->ahead = min_t(loff_t, i_size_read(inode) - end,
				  Z_EROFS_DIO_AHEAD) >> PAGE_SHIFT;
	ret = iomap_dio_rw(iocb, to, &z_erofs_dio_iomap_ops, &z_erofs_dio_ops,
			   rq->async ? 0 : IOMAP_DIO_FORCE_WAIT, rq, 0);
	z_erofs_dio_put_req(rq);
	/* if it has been queued, @to may be gone as well as @iocb */
	if (ret != -EIOCBQUEUED)
		iov_iter_reexpand(to, iov_iter_count(to) + cut);
	return ret;
}

/**
 * z_erofs_dio_read_iter - read from a compressed file opened with O_DIRECT
 * @iocb: the request; its file position and the size of @to are in bytes
 * @to: the destination
 *
 * Pclusters are decoded into the pages of @to.  Requests which are less aligned
 * than the device demands, and what can't be decoded there for other reasons,
 * are served from the page cache and, unless they are small, dropped behind;
 * trace_erofs_dio_read() tells about each of them.
 *
 * Asynchronous requests are completed by a worker, or at once by a copy; small
 * ones which follow each other take turns, or each would decode its extents
 * anew.  Nevertheless, the caller waits for index blocks that aren't cached, if
 * all of it is served from the page cache, for images in files that aren't read
 * directly, and if there are too many of such requests.
 *
 * Context: Process context, may sleep; no locks are held.
 * Return: Number of bytes read, 0 at EOF, or a negative error code: -EIOCBQUEUED
 * if an asynchronous request is going to be completed later, -EFAULT if @to
 * can't be written, -EIO if the device failed or the data is corrupted, -ENOMEM
 * if iomap can't allocate, or the page cache for what isn't direct, -EINTR or
 * -EAGAIN if the task has been killed.
 * On errors the contents of @to are undefined.
 */
ssize_t z_erofs_dio_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	loff_t size = min(i_size_read(inode), inode->i_sb->s_maxbytes);
	enum z_erofs_dio_path path;
	struct z_erofs_dio_keep *k;
	struct kiocb cached;
	ssize_t ret = 0;
	bool async, kept;

	if (iocb->ki_pos >= size)
		return 0;
	iov_iter_truncate(to, inode->i_sb->s_maxbytes - iocb->ki_pos);

	path = z_erofs_dio_path(iocb, to);
	trace_erofs_dio_read(inode, iocb->ki_pos, iov_iter_count(to), path);
	if (path == Z_EROFS_DIO_DIRECT) {
		async = !is_sync_kiocb(iocb) &&
			min_t(loff_t, iov_iter_count(to), size - iocb->ki_pos) <=
			Z_EROFS_DIO_MAX_ASYNC &&
			z_erofs_dio_get_workers(inode->i_sb);
		k = z_erofs_dio_get_keep(iocb, iov_iter_count(to), async);
		if (k)
			ret = async ? z_erofs_dio_try_kept(iocb, to, k) :
				      z_erofs_dio_read_kept(iocb, to, k);
		kept = ret;
		if (!kept)
			ret = z_erofs_dio_direct(iocb, to, async, k);
		if (k && !async) {
			z_erofs_dio_used_keep(k, inode, iocb->ki_pos);
			clear_bit_unlock(0, &k->busy);
		}
		if (kept || ret < 0 || iocb->ki_pos >= size || !iov_iter_count(to))
			return ret;
		if (fatal_signal_pending(current))
			return ret ?: -EINTR;
		/* no memory for the next window */
		trace_erofs_dio_read(inode, iocb->ki_pos, iov_iter_count(to),
				     Z_EROFS_DIO_NOMEM);
	}
	kiocb_clone(&cached, iocb, erofs_cache_file(iocb->ki_filp));
	if (iov_iter_count(to) >= Z_EROFS_DIO_DONTCACHE)
		cached.ki_flags |= IOCB_DONTCACHE;
	ret = filemap_read(&cached, to, ret);
	iocb->ki_pos = cached.ki_pos;
	return ret;
}

#ifdef CONFIG_EROFS_FS_KUNIT_TEST
#include "tests/zdio_kunit.c"
#endif
