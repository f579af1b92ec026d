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
#include <linux/memremap.h>
#include <linux/ratelimit.h>
#include <linux/sched/signal.h>
#include <trace/events/erofs.h>

/* Destination bytes which are pinned and decoded together */
#define Z_EROFS_DIO_WINDOW		SZ_1M
/* Extents which are read and decoded together; fills 8KiB with the window */
#define Z_EROFS_DIO_MAX_EXTENTS		248
/* .. and their compressed pages; the last pcluster may go beyond */
#define Z_EROFS_DIO_MAX_INPAGES		(SZ_1M / PAGE_SIZE)
/* What is dropped behind smaller requests would be decoded over and over */
#define Z_EROFS_DIO_DONTCACHE		SZ_128K

static struct bio_set z_erofs_dio_bioset;

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
};

struct z_erofs_dio_extent {
	erofs_off_t la, pa;
	unsigned int len;		/* bytes to decode from @la on */
	unsigned int plen;
	unsigned int in;		/* index of the first compressed page */
	unsigned short flags;		/* EROFS_MAP_* */
	unsigned char alg;
	bool partial;
};

struct z_erofs_dio_window {
	struct inode *inode;
	struct file *file;
	loff_t pos, end;		/* end is exclusive and never behind EOF */
	struct bio_list bios;		/* the destination, in file order */
	struct z_erofs_dio_dest dest;

	struct page **in;		/* compressed pages */
	struct page *pagepool;
	unsigned int nr_in, max_in;

	atomic_t pending;		/* compressed bios in flight + 1 */
	struct completion done;
	blk_status_t status;		/* of the first failed compressed bio */

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

/* Append a piece of memory that doesn't cross a page boundary */
static int z_erofs_dio_add(struct z_erofs_dio_dest *d, struct bio_vec *bv,
			   loff_t pos)
{
	unsigned int nr = d->max_segs;
	struct z_erofs_dio_seg *seg;

	if (d->nr_segs) {
		seg = d->segs + d->nr_segs - 1;
		if (offset_in_page(seg->base + seg->len) == bv->bv_offset &&
		    (!bv->bv_offset ||
		     d->pages[d->nr_pages - 1] == bv->bv_page)) {
			if (!bv->bv_offset)
				d->pages[d->nr_pages++] = bv->bv_page;
			seg->len += bv->bv_len;
			return 0;
		}
	}

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
		.len = bv->bv_len,
		.base = (d->nr_pages << PAGE_SHIFT) + bv->bv_offset,
	};
	d->pages[d->nr_pages++] = bv->bv_page;
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
		lo->pageofs = la & ~PAGE_MASK;
		lo->nr = PAGE_ALIGN(lo->pageofs + len) >> PAGE_SHIFT;
		lo->direct = 0;
		lo->edirect = 0;
		return;
	}
	lo->nr = PAGE_ALIGN(lo->pageofs + len) >> PAGE_SHIFT;
	lo->direct = head ? PAGE_ALIGN(lo->pageofs + head) >> PAGE_SHIFT : 0;
	lo->edirect = lo->nr;
	if (la + len > seg->pos + seg->len)
		lo->edirect = (lo->pageofs + (u32)(seg->pos + seg->len - la)) >>
				PAGE_SHIFT;
	lo->edirect = max(lo->direct, lo->edirect);
	lo->page = (base >> PAGE_SHIFT) + lo->direct;
}

/* Copy to the destination, or clear it if there is no @src */
static void z_erofs_dio_copy(const struct z_erofs_dio_dest *d, loff_t pos,
			     const void *src, unsigned int len)
{
	const struct z_erofs_dio_seg *seg = z_erofs_dio_seg(d, pos);
	unsigned int skip = pos - seg->pos, cur, n;

	for (; len; len -= n, skip += n) {
		if (skip == seg->len) {
			++seg;
			skip = 0;
		}
		cur = seg->base + skip;
		n = min3(len, seg->len - skip,
			 (unsigned int)(PAGE_SIZE - offset_in_page(cur)));
		if (src) {
			memcpy_to_page(d->pages[cur >> PAGE_SHIFT],
				       offset_in_page(cur), src, n);
			src += n;
		} else {
			memzero_page(d->pages[cur >> PAGE_SHIFT],
				     offset_in_page(cur), n);
		}
	}
}

/*
 * Gather the destination.  Decoders write bytes which aren't final, so folios
 * another filesystem keeps private data for (and may write back) are left to
 * the page cache, and so is memory of PCI devices: -ENOTBLK.
 */
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
		bio_for_each_segment(bv, bio, iter) {
			if (folio_test_private(page_folio(bv.bv_page)) ||
			    is_pci_p2pdma_page(bv.bv_page))
				return -ENOTBLK;
			err = z_erofs_dio_add(d, &bv, pos);
			if (err)
				return err;
			pos += bv.bv_len;
		}
	}
	return 0;
}

/* Look up extents backwards from *@end until there are enough to work on */
static int z_erofs_dio_map(struct z_erofs_dio_window *w, loff_t *end)
{
	unsigned int bs = i_blocksize(w->inode);
	struct erofs_map_blocks map = { .buf = __EROFS_BUF_INITIALIZER };
	struct z_erofs_dio_extent *e;
	erofs_off_t skip;
	int err = 0;

	w->nr_ext = 0;
	w->nr_in = 0;
	while (*end > w->pos && w->nr_ext < w->max_ext &&
	       w->nr_in < Z_EROFS_DIO_MAX_INPAGES) {
		map.m_la = *end - 1;
		map.m_llen = 0;
		err = z_erofs_map_blocks_iter(w->inode, &map, 0);
		if (err)
			break;
		if (map.m_la + map.m_llen < *end) {
			err = -EFSCORRUPTED;
			break;
		}
		e = &w->ext[w->nr_ext++];
		*e = (struct z_erofs_dio_extent) {
			.la = map.m_la,
			.pa = map.m_flags & EROFS_MAP_MAPPED ? map.m_pa : 0,
			.plen = map.m_plen,
			.in = w->nr_in,
			.flags = map.m_flags,
			.alg = map.m_algorithmformat,
			.partial = !EROFS_MAP_FULL(map.m_flags) ||
				   map.m_la + map.m_llen > *end,
		};
		if (map.m_flags & EROFS_MAP_MAPPED) {
			w->nr_in += PAGE_ALIGN((e->pa & (bs - 1)) + e->plen) >>
					PAGE_SHIFT;
		} else if (e->la < w->pos) {
			/* nothing is decoded, so there is no need to start there */
			skip = w->pos - e->la;
			e->la += skip;
			e->pa += skip;
		}
		e->len = *end - e->la;
		*end = max_t(loff_t, e->la, w->pos);
	}
	erofs_put_metabuf(&map.buf);
	return err;
}

static void z_erofs_dio_endio(struct bio *bio)
{
	struct z_erofs_dio_window *w = bio->bi_private;

	if (bio->bi_status)
		WRITE_ONCE(w->status, bio->bi_status);
	bio_put(bio);
	if (atomic_dec_and_test(&w->pending))
		complete(&w->done);
}

static void z_erofs_dio_submit(struct z_erofs_dio_window *w, struct bio *bio)
{
	atomic_inc(&w->pending);
	submit_bio(bio);
}

/* Add the blocks of a pcluster to @bio, or to a new one if they don't fit */
static struct bio *z_erofs_dio_read(struct z_erofs_dio_window *w,
				    struct z_erofs_dio_extent *e,
				    struct bio *bio)
{
	struct super_block *sb = w->inode->i_sb;
	struct page **in = w->in + e->in;
	struct erofs_map_dev mdev = {
		.m_pa = round_down(e->pa, sb->s_blocksize),
	};
	erofs_off_t cur, end;
	unsigned int len;

	/* no device id here, thus it will always succeed */
	(void)erofs_map_dev(sb, &mdev);
	cur = mdev.m_dif->fsoff + mdev.m_pa;
	end = cur + round_up(erofs_blkoff(sb, e->pa) + e->plen,
			     sb->s_blocksize);
	for (; cur < end; cur += len, ++in) {
		len = min_t(erofs_off_t, end - cur, PAGE_SIZE);
		if (bio && bio->bi_bdev == mdev.m_bdev &&
		    bio_end_sector(bio) == cur >> SECTOR_SHIFT &&
		    bio_add_page(bio, *in, len, 0))
			continue;
		if (bio)
			z_erofs_dio_submit(w, bio);
		bio = bio_alloc(mdev.m_bdev, bio_max_segs(w->nr_in),
				REQ_OP_READ | REQ_SYNC, GFP_KERNEL);
		bio->bi_iter.bi_sector = cur >> SECTOR_SHIFT;
		bio->bi_ioprio = bio_list_peek(&w->bios)->bi_ioprio;
		bio->bi_private = w;
		bio->bi_end_io = z_erofs_dio_endio;
		__bio_add_page(bio, *in, len, 0);
	}
	return bio;
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

static int z_erofs_dio_alloc_in(struct z_erofs_dio_window *w)
{
	unsigned int i;

	if (w->nr_in > w->max_in) {
		kvfree(w->in);
		w->max_in = 0;
		w->in = kvmalloc_objs(*w->in, w->nr_in);
		if (!w->in) {
			w->nr_in = 0;
			return -ENOMEM;
		}
		w->max_in = w->nr_in;
	}
	for (i = 0; i < w->nr_in; ++i) {
		w->in[i] = __erofs_allocpage(&w->pagepool, GFP_KERNEL, true);
		if (!w->in[i]) {
			w->nr_in = i;
			return -ENOMEM;
		}
	}
	return 0;
}

static void z_erofs_dio_free_in(struct z_erofs_dio_window *w)
{
	while (w->nr_in)
		erofs_pagepool_add(&w->pagepool, w->in[--w->nr_in]);
}

/* Read the compressed data of all extents and wait for it */
static int z_erofs_dio_read_in(struct z_erofs_dio_window *w)
{
	struct bio *bio = NULL;
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

	atomic_set(&w->pending, 1);
	reinit_completion(&w->done);
	for (i = w->nr_ext; i--;)
		if ((w->ext[i].flags & (EROFS_MAP_MAPPED | EROFS_MAP_META)) ==
		    EROFS_MAP_MAPPED)
			bio = z_erofs_dio_read(w, &w->ext[i], bio);
	if (bio)
		z_erofs_dio_submit(w, bio);
	if (!atomic_dec_and_test(&w->pending))
		wait_for_completion_io(&w->done);
	return blk_status_to_errno(w->status);
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
				struct page **out, bool copy)
{
	loff_t from = max_t(loff_t, e->la, w->pos);
	loff_t pos = (loff_t)e->la - lo->pageofs, cur, end;
	unsigned int i;
	void *src;

	for (i = 0; i < lo->nr; ++i, pos += PAGE_SIZE) {
		if (!out[i] || z_erofs_dio_is_direct(lo, i))
			continue;
		cur = max(pos, from);
		end = min_t(loff_t, pos + PAGE_SIZE, e->la + e->len);
		if (copy && cur < end) {
			src = kmap_local_page(out[i]);
			z_erofs_dio_copy(&w->dest, cur, src + (cur - pos),
					 end - cur);
			kunmap_local(src);
		}
		erofs_pagepool_add(&w->pagepool, out[i]);
	}
	kvfree(out);
}

/*
 * Get the page list for an extent which can't do with destination pages alone.
 * Pages without any wanted byte are left out: decoders skip or allocate them.
 */
static struct page **z_erofs_dio_get_out(struct z_erofs_dio_window *w,
					 struct z_erofs_dio_extent *e,
					 const struct z_erofs_dio_layout *lo)
{
	unsigned int skip = e->la < w->pos ? w->pos - e->la : 0, i;
	struct page **out;

	out = kvzalloc_objs(*out, lo->nr);
	if (!out)
		return NULL;
	for (i = (lo->pageofs + skip) >> PAGE_SHIFT; i < lo->nr; ++i) {
		if (z_erofs_dio_is_direct(lo, i)) {
			out[i] = w->dest.pages[lo->page + i - lo->direct];
			continue;
		}
		out[i] = __erofs_allocpage(&w->pagepool, GFP_KERNEL, true);
		if (!out[i]) {
			z_erofs_dio_put_out(w, e, lo, out, false);
			return NULL;
		}
	}
	return out;
}

static int z_erofs_dio_decode(struct z_erofs_dio_window *w,
			      struct z_erofs_dio_extent *e)
{
	static DEFINE_RATELIMIT_STATE(rs, DEFAULT_RATELIMIT_INTERVAL,
				      DEFAULT_RATELIMIT_BURST);
	const struct z_erofs_decompressor *alg = z_erofs_decomp[e->alg];
	struct super_block *sb = w->inode->i_sb;
	unsigned int pageofs_in = erofs_blkoff(sb, e->pa), mask = 0;
	struct z_erofs_dio_layout lo;
	const char *reason;
	struct page **out;
	bool aside;
	int err = 0;

	/* where the blocks of this format are depends on the page offset */
	if (e->alg == Z_EROFS_COMPRESSION_INTERLACED)
		mask = sb->s_blocksize - 1;
	z_erofs_dio_lay_out(&w->dest, e->la, e->len,
			    max_t(loff_t, e->la, w->pos), mask, &lo);
	aside = lo.direct || lo.edirect < lo.nr;
	if (aside)
		out = z_erofs_dio_get_out(w, e, &lo);
	else
		out = w->dest.pages + lo.page;
	if (!out)
		return -ENOMEM;

	reason = alg->decompress(&(struct z_erofs_decompress_req) {
				.sb = sb,
				.in = w->in + e->in,
				.out = out,
				.inpages = PAGE_ALIGN(pageofs_in + e->plen) >>
						PAGE_SHIFT,
				.outpages = lo.nr,
				.pageofs_in = pageofs_in,
				.pageofs_out = lo.pageofs,
				.inputsize = e->plen,
				.outputsize = e->len,
				.alg = e->alg,
				.partial_decoding = e->partial,
				.gfp = GFP_KERNEL,
			 }, &w->pagepool);
	if (reason) {
		err = IS_ERR(reason) ? PTR_ERR(reason) : -EFSCORRUPTED;
		if (err != -ENOMEM && __ratelimit(&rs))
			erofs_err(sb, "failed to decompress (%s) %s @ pa %llu size %u => %u of nid %llu",
				  alg->name,
				  IS_ERR(reason) ? "error" : reason, e->pa,
				  e->plen, e->len, EROFS_I(w->inode)->nid);
	}
	if (aside)
		z_erofs_dio_put_out(w, e, &lo, out, !err);
	return err;
}

static int z_erofs_dio_fill(struct z_erofs_dio_window *w,
			    struct z_erofs_dio_extent *e)
{
	if (e->flags & EROFS_MAP_FRAGMENT)
		return z_erofs_dio_fragment(w, e);
	if (e->flags & EROFS_MAP_MAPPED)
		return z_erofs_dio_decode(w, e);
	z_erofs_dio_copy(&w->dest, e->la, NULL, e->len);
	return 0;
}

/* Read and fill as many of the last extents before *@end as are allowed */
static int z_erofs_dio_batch(struct z_erofs_dio_window *w, loff_t *end)
{
	unsigned int i;
	int err;

	err = z_erofs_dio_map(w, end);
	if (err)
		return err;
	err = z_erofs_dio_read_in(w);
	for (i = w->nr_ext; i-- && !err;)
		err = z_erofs_dio_fill(w, &w->ext[i]);
	z_erofs_dio_free_in(w);
	cond_resched();
	return err;
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

	init_sync_kiocb(&iocb, w->file);
	iocb.ki_flags = 0;
	if (w->end - w->pos >= Z_EROFS_DIO_DONTCACHE)
		iocb.ki_flags = IOCB_DONTCACHE;
	iocb.ki_pos = w->pos;
	bio_list_for_each(bio, &w->bios) {
		bio_for_each_bvec(bv, bio, bi) {
			iov_iter_bvec(&to, ITER_DEST, &bv, 1, bv.bv_len);
			while (iov_iter_count(&to) && iocb.ki_pos < w->end) {
				ret = filemap_read(&iocb, &to, 0);
				if (ret <= 0)
					return ret ?: -EIO;
			}
		}
	}
	return 0;
}

static void z_erofs_dio_flush_dcache(struct z_erofs_dio_window *w)
{
	struct bvec_iter iter;
	struct bio_vec bv;
	struct bio *bio;

	if (!ARCH_IMPLEMENTS_FLUSH_DCACHE_PAGE)
		return;
	bio_list_for_each(bio, &w->bios)
		bio_for_each_segment(bv, bio, iter)
			flush_dcache_page(bv.bv_page);
}

static int z_erofs_dio_run(struct z_erofs_dio_window *w)
{
	loff_t end = w->end;
	int err;

	err = z_erofs_dio_gather(w);
	while (!err && end > w->pos)
		err = z_erofs_dio_batch(w, &end);
	if (err == -ENOMEM || err == -ENOTBLK) {
		trace_erofs_dio_read(w->inode, w->pos, w->end - w->pos,
				     err == -ENOMEM ? Z_EROFS_DIO_NOMEM :
						      Z_EROFS_DIO_PRIVATE);
		err = z_erofs_dio_fill_cached(w);
	}
	z_erofs_dio_flush_dcache(w);
	return err;
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
					      map.m_la + map.m_llen,
					      i_blocksize(inode));
		erofs_put_metabuf(&map.buf);
		length = min(length, end - pos);
	}

	nr = min_t(u64, (length >> inode->i_blkbits) + 2,
		   Z_EROFS_DIO_MAX_EXTENTS);
	w = kvzalloc_flex(*w, ext, nr);
	if (!w)
		return -ENOTBLK;
	w->max_ext = nr;
	w->inode = inode;
	w->file = ((struct kiocb *)iter->private)->ki_filp;
	w->pos = pos;
	init_completion(&w->done);

	/* the device is only asked for its limits and never sees these bios */
	iomap->bdev = inode->i_sb->s_bdev;
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
}

static int z_erofs_dio_iomap_end(struct inode *inode, loff_t pos,
				 loff_t length, ssize_t written,
				 unsigned int flags, struct iomap *iomap)
{
	struct z_erofs_dio_window *w = iomap->private;
	struct bio_list bios = w->bios;
	blk_status_t status = BLK_STS_OK;
	struct bio *bio;
	int err = 0;

	if (!bio_list_empty(&bios))
		err = z_erofs_dio_run(w);
	/* as if it were buffered: no other error is expected by callers */
	if (err)
		status = err == -ENOMEM ? BLK_STS_RESOURCE : BLK_STS_IOERR;
	erofs_release_pages(&w->pagepool);
	kvfree(w->in);
	kvfree(w->dest.pages);
	kfree(w->dest.segs);
	kvfree(w);

	while ((bio = bio_list_pop(&bios))) {
		bio->bi_status = status;
		bio_endio(bio);
	}
	return 0;
}

static DEFINE_IOMAP_ITER_NEXT_END(z_erofs_dio_iomap_next,
				  z_erofs_dio_iomap_begin,
				  z_erofs_dio_iomap_end);

static const struct iomap_ops z_erofs_dio_iomap_ops = {
	.iomap_next = z_erofs_dio_iomap_next,
};

static const struct iomap_dio_ops z_erofs_dio_ops = {
	.submit_io = z_erofs_dio_submit_io,
	/* all bios of a window are held until it is done: not of fs_bio_set */
	.bio_set = &z_erofs_dio_bioset,
};

/**
 * z_erofs_dio_init - set up what direct reads share
 *
 * Context: Process context, when EROFS is initialised.
 * Return: 0, or -ENOMEM.
 */
int __init z_erofs_dio_init(void)
{
	return bioset_init(&z_erofs_dio_bioset, BIO_POOL_SIZE, 0,
			   BIOSET_NEED_BVECS);
}

/**
 * z_erofs_dio_exit - undo z_erofs_dio_init()
 *
 * Context: Process context, when no file of EROFS is open any more.
 */
void z_erofs_dio_exit(void)
{
	bioset_exit(&z_erofs_dio_bioset);
}

/*
 * A bio that can't hold a logical block of the vector makes iomap fail, so each
 * part has to be a multiple of it.  They must not overlap: the last one wins if
 * they are filled one after the other, but an LZ4 extent needs all its output
 * until it is done.
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
	struct block_device *bdev = file_inode(iocb->ki_filp)->i_sb->s_bdev;
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
 * Context: Process context, may sleep; no locks are held.
 * Return: Number of bytes read, 0 at EOF, or a negative error code: -EFAULT if
 * @to can't be written, -EIO if the device failed or the data is corrupted,
 * -ENOMEM if even iomap can't allocate, -EINTR if the task has been killed.  On
 * errors the contents of @to are undefined.
 */
ssize_t z_erofs_dio_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	loff_t size = i_size_read(inode);
	int flags = iocb->ki_flags;
	enum z_erofs_dio_path path;
	unsigned int bs;
	size_t behind;
	ssize_t ret = 0;

	if (iocb->ki_pos >= size)
		return 0;

	path = z_erofs_dio_path(iocb, to);
	trace_erofs_dio_read(inode, iocb->ki_pos, iov_iter_count(to), path);
	if (path == Z_EROFS_DIO_DIRECT) {
		/* don't pin memory that nothing can be read into */
		bs = bdev_logical_block_size(inode->i_sb->s_bdev);
		behind = iov_iter_count(to);
		iov_iter_truncate(to, round_up(size, bs) - iocb->ki_pos);
		behind -= iov_iter_count(to);
		ret = iomap_dio_rw(iocb, to, &z_erofs_dio_iomap_ops,
				   &z_erofs_dio_ops, IOMAP_DIO_FORCE_WAIT,
				   iocb, 0);
		iov_iter_reexpand(to, iov_iter_count(to) + behind);
		if (ret < 0 || iocb->ki_pos >= size || !iov_iter_count(to))
			return ret;
		if (fatal_signal_pending(current))
			return ret ?: -EINTR;
		/* no memory for the next window */
		trace_erofs_dio_read(inode, iocb->ki_pos, iov_iter_count(to),
				     Z_EROFS_DIO_NOMEM);
	}
	if (iov_iter_count(to) >= Z_EROFS_DIO_DONTCACHE)
		iocb->ki_flags |= IOCB_DONTCACHE;
	ret = filemap_read(iocb, to, ret);
	iocb->ki_flags = flags;
	return ret;
}

#ifdef CONFIG_EROFS_FS_KUNIT_TEST
#include "tests/zdio_kunit.c"
#endif
