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
 * pages may be mapped by user space and change at any time.  Nothing is ever
 * read back from them but matches, which decoders copy from what they wrote:
 * a racing writer spoils its own buffer that way and nothing else, since
 * lengths and offsets only come from the (private) compressed data.
 */
#include "compress.h"
#include <linux/blkdev.h>
#include <linux/cacheinfo.h>
#include <linux/memremap.h>
#include <linux/ratelimit.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
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
/* Windows of a request whose compressed data is read or decoded by now */
#define Z_EROFS_DIO_STAGED		2
/* Asynchronous requests are pinned as a whole, thus wait for larger ones */
#define Z_EROFS_DIO_MAX_ASYNC		SZ_32M
/* Another CPU is asked to help for so many bytes, unless there are enough */
#define Z_EROFS_DIO_HELP		SZ_128K
#define Z_EROFS_DIO_MAX_HELPERS		7
/* The distance of LZ4 matches is less than 64KiB */
#define Z_EROFS_DIO_LZ4_PAGES		(SZ_64K / PAGE_SIZE + 1)
/* What is dropped behind smaller requests would be decoded over and over */
#define Z_EROFS_DIO_DONTCACHE		SZ_128K

/* What is kept for a sequential reader behind its last request */
#define Z_EROFS_DIO_KEEP		SZ_1M
/* .. how much of compressed data is read ahead for the next one */
#define Z_EROFS_DIO_AHEAD		SZ_512K
/* .. and this part of all memory for all of them */
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
 * What is known of the last request of a file, and decoded bytes behind it.
 * @busy belongs to a request, and the others do without.  Its owner may be in a
 * page fault that needs another request of the same file, so nobody waits for
 * it, apart from windows of asynchronous requests for each other: all memory
 * these need has been pinned.
 */
struct z_erofs_dio_keep {
	unsigned long busy;
	spinlock_t lock;		/* of the two below */
	bool turns;			/* it belongs to such a window */
	struct list_head waiting;	/* .. and is handed on to these */
	loff_t came;			/* where their last request to come ends */
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
/* No request depends on them, so they are shared by all superblocks */
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
	unsigned int nr_pages, nr_segs, max_segs;
	unsigned int nr_runs;		/* of physically consecutive pages */
	void *addr;			/* of the first page if all are mapped */
};

/*
 * How an extent is laid out in the list of pages given to the decoder: its
 * first byte is byte @pageofs of the first of @nr pages.  Pages [@direct,
 * @edirect) are destination pages from @page on.  The others also hold bytes
 * which don't belong there and are kernel pages to be copied from.
 */
struct z_erofs_dio_layout {
	unsigned int pageofs, nr;
	unsigned int direct, edirect;
	unsigned int page;
	unsigned int kept;		/* pages from here on are kept */
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

/* A request; gone before the last bio of it is completed */
struct z_erofs_dio_req {
	struct file *file;		/* to read what can't be done directly */
	struct z_erofs_dio_keep *keep;	/* what its windows may use in turn */
	bool sequential;
	bool async;
	loff_t end;
	unsigned int ahead;		/* pages to be read behind it */
	refcount_t ref;			/* one per window and the submitter's */

	spinlock_t lock;		/* of the two below, if asynchronous */
	unsigned int nr_staged;
	/* synchronous: windows that are staged; asynchronous: those to come */
	struct list_head windows;
};

struct z_erofs_dio_helper {
	struct work_struct work;
	struct z_erofs_dio_window *w;
};

struct z_erofs_dio_window {
	struct z_erofs_dio_req *req;
	struct z_erofs_dio_keep *keep;	/* which belongs to it, or will do so */
	struct list_head link;
	unsigned int overtaken;		/* how often, while it waited */
	struct inode *inode;
	loff_t pos, end;		/* end is exclusive and never behind EOF */
	loff_t start;			/* in front of here it has been copied */
	loff_t rest;			/* from here on it has been staged */
	int err;
	struct bio_list bios;		/* the destination, in file order */
	struct z_erofs_dio_dest dest;

	struct page **in;		/* compressed pages */
	struct page *pagepool;
	unsigned int nr_in, max_in;

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

static int z_erofs_dio_new_seg(struct z_erofs_dio_dest *d, loff_t pos,
			       unsigned int offset)
{
	unsigned int nr = d->max_segs;
	struct z_erofs_dio_seg *seg;

	if (d->nr_segs == nr) {
		nr = 2 * nr + 1;
		seg = krealloc_array(d->segs, nr, sizeof(*seg), GFP_KERNEL);
		if (!seg)
			return -ENOMEM;
		d->segs = seg;
		d->max_segs = nr;
	}
	d->segs[d->nr_segs++] = (struct z_erofs_dio_seg) {
		.pos = pos,
		.base = (d->nr_pages << PAGE_SHIFT) + offset,
	};
	return 0;
}

/* Append a piece of memory that is physically consecutive */
static int z_erofs_dio_add(struct z_erofs_dio_dest *d, const struct bio_vec *bv,
			   loff_t pos)
{
	struct page *page = bv->bv_page, *last = NULL;
	unsigned int nr = DIV_ROUND_UP(bv->bv_offset + bv->bv_len, PAGE_SIZE);
	struct z_erofs_dio_seg *seg = NULL;
	int err;

	if (d->nr_pages) {
		last = d->pages[d->nr_pages - 1];
		seg = d->segs + d->nr_segs - 1;
	}
	if (!last || offset_in_page(seg->base + seg->len) != bv->bv_offset ||
	    (bv->bv_offset && last != page)) {
		err = z_erofs_dio_new_seg(d, pos, bv->bv_offset);
		if (err)
			return err;
		seg = d->segs + d->nr_segs - 1;
	} else if (bv->bv_offset) {
		++page;
		--nr;
	}
	seg->len += bv->bv_len;
	if (nr && (!last || page_to_pfn(page) != page_to_pfn(last) + 1))
		++d->nr_runs;
	for (; nr; --nr)
		d->pages[d->nr_pages++] = page++;
	return 0;
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
	lo->nr = PAGE_ALIGN(lo->pageofs + len) >> PAGE_SHIFT;
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
	lo->nr = PAGE_ALIGN(lo->pageofs + len) >> PAGE_SHIFT;
	lo->kept = lo->nr;
	lo->direct = head ? PAGE_ALIGN(lo->pageofs + head) >> PAGE_SHIFT : 0;
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

	bv.bv_len = min3(len, seg->len - skip,
			 (unsigned int)PAGE_SIZE - bv.bv_offset);
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
	unsigned int nr = DIV_ROUND_UP(bv->bv_offset + bv->bv_len, PAGE_SIZE);
	struct folio *folio;
	unsigned int i;

	/* those of the kernel may consist of several folios */
	for (i = 0; i < nr; i += folio_nr_pages(folio) -
				 folio_page_idx(folio, bv->bv_page + i)) {
		folio = page_folio(bv->bv_page + i);
		if (folio_test_private(folio) ||
		    is_pci_p2pdma_page(bv->bv_page + i))
			return true;
	}
	return false;
}

/* Gather the destination, or -ENOTBLK if it is not for decoders */
static int z_erofs_dio_gather(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_dest *d = &w->dest;
	struct bvec_iter iter;
	struct bio_vec bv;
	struct bio *bio;
	loff_t pos = w->pos;
	unsigned int nr = 0;
	int err;

	bio_list_for_each(bio, &w->bios)
		nr += bio_segments(bio);
	d->pages = kvmalloc_objs(*d->pages, nr);
	if (!d->pages)
		return -ENOMEM;

	bio_list_for_each(bio, &w->bios) {
		bio_for_each_bvec(bv, bio, iter) {
			bv.bv_page += bv.bv_offset >> PAGE_SHIFT;
			bv.bv_offset = offset_in_page(bv.bv_offset);
			if (z_erofs_dio_is_foreign(&bv))
				return -ENOTBLK;
			err = z_erofs_dio_add(d, &bv, pos);
			if (err)
				return err;
			pos += bv.bv_len;
		}
	}
	return 0;
}

static void z_erofs_dio_copy_page(const struct z_erofs_dio_dest *d, loff_t pos,
				  struct page *page, unsigned int ofs,
				  unsigned int len)
{
	void *src = kmap_local_page(page);

	z_erofs_dio_copy(d, pos, src + ofs, len);
	kunmap_local(src);
}

static struct page *z_erofs_dio_kept_page(struct z_erofs_dio_keep *k,
					  loff_t pos)
{
	return k->pages[(pos >> PAGE_SHIFT) - (k->pos >> PAGE_SHIFT)];
}

/* Nothing is kept any more; returns what is left to be freed by vfree() */
static void *z_erofs_dio_drop(struct z_erofs_dio_keep *k)
{
	void *addr = k->addr;

	k->pos = 0;
	k->end = 0;
	k->addr = NULL;
	k->nr_pages = 0;
	return addr;
}

/*
 * Who uses some pages of a folio that compressed data is read into has one
 * reference, however many they are.
 */
static void z_erofs_dio_get_pages(struct page **pages, unsigned int nr)
{
	unsigned int i;

	for (i = 0; i < nr; ++i)
		if (!i || page_folio(pages[i]) != page_folio(pages[i - 1]))
			folio_get(page_folio(pages[i]));
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
	z_erofs_dio_nr_kept -= k->nr;
	z_erofs_dio_nr_kept += nr;
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
 * If all files together have too many pages, those who have had theirs for
 * longer lose them: readers who go on get new ones.
 */
static bool z_erofs_dio_may_keep(void)
{
	while (READ_ONCE(z_erofs_dio_nr_kept) >=
	       totalram_pages() / Z_EROFS_DIO_MAX_KEPT)
		if (!z_erofs_dio_shrink_one())
			return false;
	return true;
}

/* Have room for @nr pages */
static bool z_erofs_dio_make_room(struct z_erofs_dio_keep *k, unsigned int nr)
{
	gfp_t gfp = (GFP_KERNEL & ~__GFP_RECLAIM) | __GFP_NOWARN;
	unsigned int got = 0, before;
	struct page **pages;

	k->pos = 0;
	k->end = 0;
	if (nr <= k->nr_pages)
		return true;
	vfree(z_erofs_dio_drop(k));
	if (!z_erofs_dio_may_keep())
		return false;
	nr = round_up(nr, max_t(unsigned int, SZ_64K / PAGE_SIZE, 1));
	pages = kvcalloc(nr, sizeof(*pages), gfp);
	if (!pages)
		return false;
	do {
		before = got;
		got = alloc_pages_bulk(gfp, nr, pages);
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

	do {
		nr = z_erofs_dio_shrink_one();
		freed += nr;
	} while (nr && freed < sc->nr_to_scan);
	return freed ?: SHRINK_STOP;
}

/* At once, as the end of the window may replace it before its start is due */
static void z_erofs_dio_copy_kept(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_keep *k = w->keep;
	unsigned int len;
	loff_t end;

	if (!k || w->pos < k->pos)
		return;
	end = min(w->end, k->end);
	for (; w->start < end; w->start += len) {
		len = min_t(loff_t, end - w->start,
			    PAGE_SIZE - offset_in_page(w->start));
		z_erofs_dio_copy_page(&w->dest, w->start,
				      z_erofs_dio_kept_page(k, w->start),
				      offset_in_page(w->start), len);
	}
}

/* The page cache never differs, and copying is cheaper than decoding */
static bool z_erofs_dio_copy_cached(struct z_erofs_dio_window *w, loff_t pos,
				    loff_t end)
{
	struct address_space *mapping = w->req->file->f_mapping;
	struct folio *folio;
	struct page *page;
	unsigned int len;
	bool found = READ_ONCE(mapping->nrpages);

	for (; found && pos < end; pos += len) {
		folio = __filemap_get_folio(mapping, pos >> PAGE_SHIFT,
					    FGP_DONTCACHE, 0);
		if (IS_ERR(folio))
			return false;
		len = min_t(loff_t, end - pos, PAGE_SIZE - offset_in_page(pos));
		found = folio_test_uptodate(folio);
		page = folio_file_page(folio, pos >> PAGE_SHIFT);
		if (found)
			z_erofs_dio_copy_page(&w->dest, pos, page,
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

	(void)erofs_map_dev(sb, &mdev);
	mask = (bdev_logical_block_size(mdev.m_bdev) - 1) |
		bdev_dma_alignment(mdev.m_bdev);
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

	if (end <= w->end || w->end - max_t(loff_t, e->la, w->start) > Z_EROFS_DIO_KEEP)
		return;
	e->keep = true;
	e->len = end - e->la;
	e->partial = !EROFS_MAP_FULL(e->flags) || end < lend;
}

/* Look up extents backwards from w->rest until there are enough to work on */
static int z_erofs_dio_map(struct z_erofs_dio_window *w)
{
	unsigned int bs = i_blocksize(w->inode);
	struct erofs_map_blocks map = { .buf = __EROFS_BUF_INITIALIZER };
	struct z_erofs_dio_extent *e = NULL;
	struct erofs_device_info *dif, *last = NULL;
	int flags, err = 0;
	loff_t from;
	bool keep;

	w->nr_ext = 0;
	w->nr_in = 0;
	while (w->rest > w->start && w->nr_ext < w->max_ext &&
	       w->nr_in < Z_EROFS_DIO_MAX_INPAGES) {
		/* the next request is going to need the rest of the last one */
		keep = w->keep && w->req->sequential && w->rest == w->req->end;
		flags = keep ? EROFS_GET_BLOCKS_FIEMAP : 0;
		if (w->rest == map.m_la)
			flags |= EROFS_GET_BLOCKS_PREVIOUS;
		map.m_la = w->rest - 1;
		map.m_llen = map.m_la - w->start;
		err = z_erofs_map_blocks_iter(w->inode, &map, flags);
		if (err && keep) {
			/* something may be wrong that nobody has asked for */
			keep = false;
			map.m_la = w->rest - 1;
			err = z_erofs_map_blocks_iter(w->inode, &map, 0);
		}
		if (err)
			break;
		if (map.m_la + map.m_llen < w->rest) {
			err = -EFSCORRUPTED;
			break;
		}
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
			.in = w->nr_in,
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
			e->inpages = PAGE_ALIGN((e->pa & (bs - 1)) + e->plen) >>
					PAGE_SHIFT;
			w->nr_in += e->inpages;
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
	queue_work(EROFS_I_SB(w->inode)->dio_workqueue, &w->work);
}

/* Callers who wait decode on their own: they need not wait for a worker, too */
static void z_erofs_dio_put_pending(struct z_erofs_dio_window *w)
{
	if (!atomic_dec_and_test(&w->pending))
		return;
	if (w->req->async)
		z_erofs_dio_queue_work(w);
	else
		complete(&w->done);
}

static void z_erofs_dio_endio(struct bio *bio)
{
	struct z_erofs_dio_window *w = bio->bi_private;

	if (bio->bi_status)
		WRITE_ONCE(w->status, bio->bi_status);
	if (bio->bi_bdev)
		bio_put(bio);
	z_erofs_dio_put_pending(w);
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
			/* even if somebody polls for @dest */
			bio->bi_opf &= ~REQ_POLLED;
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
	gfp_t cheap = (gfp & ~__GFP_RECLAIM) | __GFP_NOWARN;
	struct folio *folio = NULL;

	nr = min3(max(nr, Z_EROFS_DIO_FOLIO), Z_EROFS_DIO_MAX_FOLIO, left);
	if (nr > 1)
		folio = folio_alloc(cheap, get_order(nr << PAGE_SHIFT));
	return folio ?: folio_alloc(gfp, 0);
}

static void z_erofs_dio_ahead_endio(struct bio *bio)
{
	struct z_erofs_dio_ahead *a = bio->bi_private;

	a->status = bio->bi_status;
	bio_put(bio);
	complete_all(&a->done);
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
	gfp_t gfp = (GFP_KERNEL & ~__GFP_RECLAIM) | __GFP_NOWARN;
	struct folio *folio;
	erofs_off_t pa, end;
	unsigned int nr, i;
	struct bio *bio;

	if (!completion_done(&a->done))
		return;
	z_erofs_dio_settle_ahead(a);
	(void)erofs_map_dev(sb, &mdev);
	/* extents which aren't aligned share blocks */
	pa = round_down(mdev.m_pa + e->plen, i_blocksize(w->inode));
	/* one which is late: others have been there */
	if (w->req->async && a->dif == mdev.m_dif && pa < a->pa &&
	    a->pa - pa < Z_EROFS_DIO_AHEAD)
		return;
	if (a->dif == mdev.m_dif && pa >= a->pa &&
	    pa - a->pa < (erofs_off_t)a->nr << PAGE_SHIFT) {
		z_erofs_dio_drop_ahead(a, (pa - a->pa) >> PAGE_SHIFT);
	} else {
		/* extents may be anywhere on the device: guess less often then */
		if (a->nr) {
			a->missed = a->used ? 0 : min(2 * a->missed + 1, 63U);
			a->wait = a->missed;
		}
		z_erofs_dio_drop_ahead(a, a->nr);
		a->dif = mdev.m_dif;
		a->pa = pa;
	}
	end = bdev_nr_bytes(mdev.m_bdev);
	pa = a->pa + mdev.m_dif->fsoff + ((erofs_off_t)a->nr << PAGE_SHIFT);
	if (a->nr > w->req->ahead / 2 || pa >= end)
		return;
	if (a->wait) {
		--a->wait;
		return;
	}
	if (!z_erofs_dio_may_keep())
		return;

	bio = bio_alloc(mdev.m_bdev, w->req->ahead - a->nr,
			REQ_OP_READ | REQ_RAHEAD, gfp);
	if (!bio)
		return;
	bio->bi_iter.bi_sector = pa >> SECTOR_SHIFT;
	bio->bi_ioprio = bio_list_peek(&w->bios)->bi_ioprio;
	bio_clone_blkg_association(bio, bio_list_peek(&w->bios));
	bio->bi_private = a;
	bio->bi_end_io = z_erofs_dio_ahead_endio;
	end = min(end, pa + ((erofs_off_t)(w->req->ahead - a->nr) << PAGE_SHIFT));
	for (; pa + PAGE_SIZE <= end; pa += folio_size(folio)) {
		nr = rounddown_pow_of_two((unsigned int)((end - pa) >> PAGE_SHIFT));
		folio = z_erofs_dio_alloc_folio(nr, e->inpages, gfp);
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
	submit_bio(bio);
}

/* The compressed pages of an extent, if all of them have been read ahead */
static bool z_erofs_dio_take_ahead(struct z_erofs_dio_window *w,
				   struct z_erofs_dio_extent *e)
{
	struct z_erofs_dio_ahead *a = &w->keep->ahead;
	struct erofs_map_dev mdev = { .m_pa = e->pa };
	struct page **in = w->in + e->in;
	erofs_off_t pa, nr;		/* it may be anywhere on the device */

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
	memcpy(in, a->pages + nr, e->inpages * sizeof(*in));
	z_erofs_dio_get_pages(in, e->inpages);
	return true;
}

/* In ascending order: extents which follow each other also do so in memory */
static int z_erofs_dio_alloc_in(struct z_erofs_dio_window *w)
{
	unsigned int left = w->nr_in, room = 0, i = w->nr_ext, j;
	bool ahead = w->keep && w->keep->ahead.nr;
	struct z_erofs_dio_extent *e;
	struct page **in, *page = NULL;
	struct folio *folio;

	if (w->nr_in > w->max_in) {
		kvfree(w->in);
		w->max_in = 0;
		w->in = kvmalloc_objs(*w->in, w->nr_in);
		if (!w->in)
			goto nomem;
		w->max_in = w->nr_in;
	}
	for (; i--; left -= e->inpages) {
		e = &w->ext[i];
		if (ahead && e->inpages && !(e->flags & EROFS_MAP_META)) {
			e->ahead = z_erofs_dio_take_ahead(w, e);
			ahead = e->ahead;
		}
		if (e->ahead)
			continue;
		/* don't split what a folio of its own can hold */
		if (room < e->inpages && e->inpages <= Z_EROFS_DIO_MAX_FOLIO)
			room = 0;
		in = w->in + e->in;
		for (j = 0; j < e->inpages; ++j, --room) {
			if (!room) {
				folio = z_erofs_dio_alloc_folio(left - j,
								e->inpages - j,
								GFP_KERNEL);
				if (!folio) {
					e->inpages = j;
					goto nomem;
				}
				page = folio_page(folio, 0);
				room = folio_nr_pages(folio);
			} else if (!j) {
				folio_get(page_folio(page));
			}
			in[j] = page++;
		}
	}
	return 0;
nomem:
	while (i--)
		w->ext[i].inpages = 0;
	return -ENOMEM;
}

static void z_erofs_dio_free_in(struct z_erofs_dio_window *w)
{
	unsigned int i;

	for (i = 0; i < w->nr_ext; ++i)
		z_erofs_dio_put_pages(w->in + w->ext[i].in, w->ext[i].inpages);
	w->nr_ext = 0;
}

/* Submit reads of all compressed data */
static int z_erofs_dio_read_in(struct z_erofs_dio_window *w)
{
	unsigned int i;
	int err;

	err = z_erofs_dio_alloc_in(w);
	if (err)
		return err;

	/* metadata may have to be read: not with a bio at hand */
	for (i = 0; i < w->nr_ext; ++i) {
		if (!(w->ext[i].flags & EROFS_MAP_META))
			continue;
		err = z_erofs_dio_read_meta(w, &w->ext[i]);
		if (err)
			return err;
	}

	for (i = w->nr_ext; i--;) {
		if (w->ext[i].plain)
			z_erofs_dio_read_plain(w, &w->ext[i]);
		else if ((w->ext[i].flags & (EROFS_MAP_MAPPED | EROFS_MAP_META)) ==
			 EROFS_MAP_MAPPED && !w->ext[i].ahead)
			z_erofs_dio_read(w, &w->ext[i]);
	}
	z_erofs_dio_submit(w);
	if (w->keep && w->req->ahead && w->nr_ext && w->ext->inpages &&
	    !(w->ext->flags & EROFS_MAP_META) &&
	    w->ext->la + w->ext->len >= w->req->end)
		z_erofs_dio_read_ahead(w, w->ext);
	return 0;
}

/*
 * Whether to go on now, which may be without what is kept, or to wait in order
 * of positions.  Nobody is overtaken more than 8 times.
 */
static bool z_erofs_dio_take_turn(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_keep *k = w->keep;
	struct z_erofs_dio_window *prev;
	struct list_head *at;

	guard(spinlock)(&k->lock);
	if (!test_and_set_bit_lock(0, &k->busy)) {
		k->turns = true;
		return true;
	}
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

static void z_erofs_dio_end_turn(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_keep *k = w->keep;
	struct z_erofs_dio_window *next;

	z_erofs_dio_used_keep(k, w->inode, w->req->end);
	w->keep = NULL;
	spin_lock(&k->lock);
	next = list_first_entry_or_null(&k->waiting, struct z_erofs_dio_window,
					link);
	if (next) {
		list_del(&next->link);
	} else {
		k->turns = false;
		clear_bit_unlock(0, &k->busy);
	}
	spin_unlock(&k->lock);
	if (next)
		z_erofs_dio_queue_work(next);
}

/*
 * Stage as many of the last extents before w->rest as are allowed.  Unless it
 * returns true, since nothing has to be read, the window of an asynchronous
 * request belongs to the worker from now on.
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

/* LZ4 only looks back so far, thus these pages are used over and over */
static bool z_erofs_dio_is_recycled(struct page **out, unsigned int i)
{
	return i >= Z_EROFS_DIO_LZ4_PAGES &&
	       out[i] == out[i - Z_EROFS_DIO_LZ4_PAGES];
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
		if (!out[i] || z_erofs_dio_is_direct(lo, i) ||
		    z_erofs_dio_is_recycled(out, i))
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

/* The first page of an extent that has a byte which is wanted */
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
 * something to write to, and LZ4 to find matches in.
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
		if (z_erofs_dio_is_direct(lo, i)) {
			out[i] = w->dest.pages[lo->page + i - lo->direct];
			continue;
		}
		if (i >= lo->kept) {
			out[i] = w->keep->pages[i - lo->kept];
			continue;
		}
		if (i >= Z_EROFS_DIO_LZ4_PAGES && i < gap) {
			out[i] = out[i - Z_EROFS_DIO_LZ4_PAGES];
			continue;
		}
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
	e->keep = false;
	e->partial = true;
	e->len = w->end - e->la;
}

/* An extent of which something is kept is decoded where no user sees it */
static void z_erofs_dio_lay_keep(struct z_erofs_dio_window *w,
				 struct z_erofs_dio_extent *e,
				 struct z_erofs_dio_layout *lo)
{
	z_erofs_dio_lay_aside(e->la, e->len, lo);
	lo->kept = z_erofs_dio_gap(w, e, lo);
	if (!z_erofs_dio_make_room(w->keep, lo->nr - lo->kept))
		z_erofs_dio_dont_keep(w, e);
}

/* The kept pages of an extent are as they should be */
static void z_erofs_dio_kept_now(struct z_erofs_dio_keep *k,
				 const struct z_erofs_dio_extent *e,
				 const struct z_erofs_dio_layout *lo)
{
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
	unsigned int pageofs_in = erofs_blkoff(sb, e->pa), mask = 0;
	struct z_erofs_dio_layout lo;
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
	if (!lo.kept && !cpu_dcache_is_aliasing())
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
				.pageofs_in = pageofs_in,
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
	if (!err && e->keep)
		z_erofs_dio_kept_now(w->keep, e, &lo);
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
 * Fill extents until there is none left that nobody else fills.  The bytes of
 * extents which meet in a page don't: each is written by one CPU only.
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
	if (d->addr || !w->nr_ext || w->ext->alg != Z_EROFS_COMPRESSION_LZ4 ||
	    cpu_dcache_is_aliasing())
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

	if (w->err)
		return;
	z_erofs_dio_map_dest(w);
	max = min3((u32)(w->end - w->pos) / Z_EROFS_DIO_HELP,
		   w->nr_ext ? w->nr_ext - 1 : 0, Z_EROFS_DIO_MAX_HELPERS);
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

	init_sync_kiocb(&iocb, w->req->file);
	iocb.ki_flags = w->end - w->pos >= Z_EROFS_DIO_DONTCACHE ?
			IOCB_DONTCACHE : 0;
	iocb.ki_pos = w->pos;
	bio_list_for_each(bio, &w->bios) {
		bio_for_each_segment(bv, bio, bi) {
			iov_iter_bvec(&to, ITER_DEST, &bv, 1, bv.bv_len);
			while (iov_iter_count(&to) && iocb.ki_pos < w->end) {
				ret = filemap_read(&iocb, &to, 0);
				if (ret <= 0)
					return ret ?: -EIO;
			}
			flush_dcache_page(bv.bv_page);
		}
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
	erofs_release_pages(&w->pagepool);
	return true;
}

static void z_erofs_dio_put_req(struct z_erofs_dio_req *rq)
{
	if (refcount_dec_and_test(&rq->ref))
		kfree(rq);
}

static void z_erofs_dio_free_window(struct z_erofs_dio_window *w)
{
	erofs_release_pages(&w->pagepool);
	kvfree(w->in);
	if (is_vmalloc_addr(w->dest.addr))
		vm_unmap_ram(w->dest.addr, w->dest.nr_pages);
	kvfree(w->dest.pages);
	kfree(w->dest.segs);
	kvfree(w);
}

/* A window of an asynchronous request is done: it's the turn of another one */
static void z_erofs_dio_next(struct z_erofs_dio_req *rq)
{
	struct z_erofs_dio_window *w;

	spin_lock(&rq->lock);
	w = list_first_entry_or_null(&rq->windows, struct z_erofs_dio_window,
				     link);
	if (w)
		list_del(&w->link);
	else
		--rq->nr_staged;
	spin_unlock(&rq->lock);
	if (w)
		z_erofs_dio_queue_work(w);
}

/* All has been filled, or something failed */
static void z_erofs_dio_end(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_req *rq = w->req;
	struct bio_list bios = w->bios;
	blk_status_t status = BLK_STS_OK;
	struct bio *bio;
	unsigned int i;
	int err = w->err;

	if (err == -ENOMEM || err == -ENOTBLK) {
		trace_erofs_dio_read(w->inode, w->pos, w->end - w->pos,
				     err == -ENOMEM ? Z_EROFS_DIO_NOMEM :
						      Z_EROFS_DIO_PRIVATE);
		err = z_erofs_dio_fill_cached(w);
	}
	/* as if it were buffered: no other error is expected by callers */
	if (err)
		status = err == -ENOMEM ? BLK_STS_RESOURCE : BLK_STS_IOERR;
	for (i = 0; i < w->dest.nr_pages; ++i)
		flush_dcache_page(w->dest.pages[i]);
	if (rq->async && w->keep)
		z_erofs_dio_end_turn(w);
	else if (rq->async && !rq->keep)
		z_erofs_dio_next(rq);
	/*
	 * As late as possible: the work of a new window at this address would
	 * be taken for the one that is running, and wait for it.
	 */
	z_erofs_dio_free_window(w);
	z_erofs_dio_put_req(rq);

	while ((bio = bio_list_pop(&bios))) {
		bio->bi_status = status;
		bio_endio(bio);
	}
}

static void z_erofs_dio_work(struct work_struct *work)
{
	struct z_erofs_dio_window *w =
		container_of(work, struct z_erofs_dio_window, work);
	/* reclaim may wait for the submitter, who can be a block device */
	unsigned int noio = memalloc_noio_save();
	bool more;

	/* of those whose turn has come, nothing has been staged so far */
	do
		more = z_erofs_dio_unstage(w);
	while (more && z_erofs_dio_stage(w));
	if (!more)
		z_erofs_dio_end(w);
	memalloc_noio_restore(noio);
}

/* End windows of a synchronous request until no more than @nr are staged */
static void z_erofs_dio_drain(struct z_erofs_dio_req *rq, unsigned int nr)
{
	struct z_erofs_dio_window *w;

	while (rq->nr_staged > nr) {
		w = list_first_entry(&rq->windows, struct z_erofs_dio_window,
				     link);
		list_del(&w->link);
		--rq->nr_staged;
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
}

/* While a window is decoded here, the device is to read for the next one */
static void z_erofs_dio_queue_sync(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_req *rq = w->req;

	init_completion(&w->done);
	list_add_tail(&w->link, &rq->windows);
	++rq->nr_staged;
	z_erofs_dio_stage(w);
	/* .. so don't leave it in the plug of iomap */
	if (current->plug)
		blk_finish_plug(current->plug);
	z_erofs_dio_drain(rq, Z_EROFS_DIO_STAGED - 1);
}

static void z_erofs_dio_queue_async(struct z_erofs_dio_window *w)
{
	struct z_erofs_dio_req *rq = w->req;
	bool stage;

	INIT_WORK(&w->work, z_erofs_dio_work);
	if (rq->keep) {
		stage = z_erofs_dio_take_turn(w);
	} else {
		spin_lock(&rq->lock);
		stage = rq->nr_staged < Z_EROFS_DIO_STAGED;
		if (stage)
			++rq->nr_staged;
		else
			list_add_tail(&w->link, &rq->windows);
		spin_unlock(&rq->lock);
	}
	/* a worker stages if others wait for it: a submitter may be in reclaim */
	if (stage && (w->keep || z_erofs_dio_stage(w)))
		z_erofs_dio_queue_work(w);
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
	unsigned int bs = max(i_blocksize(inode), bdev_logical_block_size(bdev));
	struct z_erofs_dio_window *w;
	unsigned int nr;
	loff_t end;
	int err;

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
	w = kvzalloc_flex(*w, ext, nr);
	if (!w)
		return -ENOTBLK;
	w->max_ext = nr;
	w->req = iter->private;
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

	if (bio_list_empty(&w->bios)) {
		z_erofs_dio_free_window(w);
		return 0;
	}
	refcount_inc(&w->req->ref);
	if (w->req->async)
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
	if (ret <= 0 && !rq->async)
		z_erofs_dio_drain(rq, 0);
	return ret;
}

static const struct iomap_ops z_erofs_dio_iomap_ops = {
	.iomap_next = z_erofs_dio_iomap_next,
};

static const struct iomap_dio_ops z_erofs_dio_ops = {
	.submit_io = z_erofs_dio_submit_io,
	/*
	 * All bios of a window are held until it is done, thus not those of
	 * fs_bio_set: without any memory for more, only this waits for some.
	 */
	.bio_set = &z_erofs_dio_bioset,
};

/*
 * Workers wait for data of images and devices below, which can be compressed
 * files of other superblocks.  With one workqueue for all of them, workers could
 * take the places of those they wait for.  Few superblocks ever need one.
 */
static bool z_erofs_dio_has_workers(struct super_block *sb)
{
	struct workqueue_struct **p = &EROFS_SB(sb)->dio_workqueue, *wq;

	if (READ_ONCE(*p))
		return true;
	wq = alloc_workqueue("erofs_dio/%s", WQ_UNBOUND | WQ_HIGHPRI, 0,
			     sb->s_id);
	if (!wq)
		return false;
	if (cmpxchg(p, NULL, wq))
		destroy_workqueue(wq);
	return true;
}

/**
 * z_erofs_dio_exit_super - let go of the workers of a superblock, if it has any
 * @sbi: what is left of a superblock without any inode
 *
 * Context: Process context, waits for workers which return.
 */
void z_erofs_dio_exit_super(struct erofs_sb_info *sbi)
{
	if (sbi->dio_workqueue)
		destroy_workqueue(sbi->dio_workqueue);
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
 * until it is done.  Those who pass bvecs that overlap get what they ask for.
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
	mask = bdev_logical_block_size(bdev) - 1;
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

	if (erofs_cache_file(file) != file ||
	    (async && count > Z_EROFS_DIO_TURN))
		return NULL;
	k = READ_ONCE(file->private_data);
	if (!k) {
		k = kzalloc_obj(*k, GFP_KERNEL_ACCOUNT);
		if (!k)
			return NULL;
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
	spin_lock(&z_erofs_dio_kept_lock);
	z_erofs_dio_account(k, 0);
	spin_unlock(&z_erofs_dio_kept_lock);
	vfree(k->addr);
	wait_for_completion_io(&k->ahead.done);
	z_erofs_dio_drop_ahead(&k->ahead, k->ahead.nr);
	kfree(k);
	return 0;
}

/* Serve a request that only needs what is kept */
static ssize_t z_erofs_dio_read_kept(struct kiocb *iocb, struct iov_iter *to,
				     struct z_erofs_dio_keep *k)
{
	loff_t pos = iocb->ki_pos;
	loff_t end = min_t(loff_t, pos + iov_iter_count(to),
			   i_size_read(file_inode(iocb->ki_filp)));
	ssize_t ret = 0;
	size_t n, len;

	if (pos < k->pos || end > k->end)
		return 0;
	for (; pos < end; pos += n) {
		len = min_t(loff_t, end - pos, PAGE_SIZE - offset_in_page(pos));
		n = copy_page_to_iter(z_erofs_dio_kept_page(k, pos),
				      offset_in_page(pos), len, to);
		iocb->ki_pos += n;
		ret += n;
		if (n < len)
			return ret ?: -EFAULT;
	}
	return ret;
}

static ssize_t z_erofs_dio_direct(struct kiocb *iocb, struct iov_iter *to,
				  bool async, struct z_erofs_dio_keep *k)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	size_t count = iov_iter_count(to);
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
	bs = bdev_logical_block_size(erofs_dio_bdev(inode));
	iov_iter_truncate(to, round_up(i_size_read(inode), bs) - iocb->ki_pos);
	count -= iov_iter_count(to);
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
	spin_lock_init(&rq->lock);
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
		iov_iter_reexpand(to, iov_iter_count(to) + count);
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
 * Asynchronous requests are completed by a worker; small ones which follow each
 * other take turns, or each would decode its extents anew.  Index blocks that
 * aren't cached are read before the others are queued, what the page cache serves
 * as well, and images in files unless these are read directly.
 *
 * Context: Process context, may sleep; no locks are held.
 * Return: Number of bytes read, 0 at EOF, or a negative error code: -EIOCBQUEUED
 * if an asynchronous request is going to be completed later, -EFAULT if @to
 * can't be written, -EIO if the device failed or the data is corrupted, -ENOMEM
 * if even iomap can't allocate, -EINTR if the task has been killed.  On errors
 * the contents of @to are undefined.
 */
ssize_t z_erofs_dio_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	loff_t size = i_size_read(inode);
	enum z_erofs_dio_path path;
	struct z_erofs_dio_keep *k;
	struct kiocb cached;
	ssize_t ret = 0;
	bool async, kept;

	if (iocb->ki_pos >= size)
		return 0;

	path = z_erofs_dio_path(iocb, to);
	trace_erofs_dio_read(inode, iocb->ki_pos, iov_iter_count(to), path);
	if (path == Z_EROFS_DIO_DIRECT) {
		async = !is_sync_kiocb(iocb) &&
			min_t(loff_t, iov_iter_count(to), size - iocb->ki_pos) <=
			Z_EROFS_DIO_MAX_ASYNC &&
			z_erofs_dio_has_workers(inode->i_sb);
		k = z_erofs_dio_get_keep(iocb, iov_iter_count(to), async);
		if (k && !async)
			ret = z_erofs_dio_read_kept(iocb, to, k);
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
