// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
//
// Marks which blocks of one disk change: a bit for each granule of 64 KiB, set when a write is submitted and again when it
// completes. `FORMAT.md` beside this file says what user space and this program promise each other.
//
// Compiled ahead, relocated when it is loaded (CO-RE): the few fields of the kernel's structures that are read are found by
// the kernel's own type information, whatever their place is there.

typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define always_inline inline __attribute__((always_inline))
#define relocated __attribute__((preserve_access_index))

#define BPF_MAP_TYPE_ARRAY 2
#define BPF_F_MMAPABLE 1024

struct gendisk { int major; int first_minor; } relocated;
struct block_device { struct gendisk *bd_disk; } relocated;
struct bvec_iter { u64 bi_sector; u32 bi_size; } relocated;
struct bio { struct block_device *bi_bdev; u32 bi_opf; struct bvec_iter bi_iter; } relocated;
struct request_queue { struct gendisk *disk; } relocated;
struct request { struct request_queue *q; u32 cmd_flags; u64 __sector; } relocated;

// As linux/blk_types.h: the low byte is the operation, and odd ones move data to the device.
#define OPERATION 0xff
#define TO_DEVICE 1
#define DRIVER_OUT 35

#define GRANULE_SHIFT 7 // sectors of 512 bytes
// One bio holds less than 4 GiB: at most so many words of 64 granules.
#define WORDS_MAX 1026

struct map {
    int (*type)[BPF_MAP_TYPE_ARRAY];
    int (*map_flags)[BPF_F_MMAPABLE];
    u32 *key;
    u64 *value;
    int (*max_entries)[1];
};
// The size of the first two is set when they are made.
struct map live SEC(".maps");
struct map claimed SEC(".maps");
struct {
    int (*type)[BPF_MAP_TYPE_ARRAY];
    int (*map_flags)[BPF_F_MMAPABLE];
    u32 *key;
    u64 *value;
    int (*max_entries)[8];
} state SEC(".maps");
#define STATE_BLIND 0

// Which disk, and which part of it: set when it is loaded.
const volatile int MAJOR = 0;
const volatile int FIRST_MINOR = 0;
const volatile u64 FIRST_SECTOR = 0;
const volatile u64 SECTORS = 0;

static void *(*const map_lookup)(void *map, const void *key) = (void *)1;

static always_inline int is_ours(struct gendisk *disk)
{
    return disk->major == MAJOR && disk->first_minor == FIRST_MINOR;
}

// A write of which nobody knows where it goes.
static always_inline void blind(void)
{
    u32 key = STATE_BLIND;
    u64 *count = map_lookup(&state, &key);

    if (count)
        __sync_fetch_and_add(count, 1);
}

static always_inline void mark(u64 sector, u64 bytes)
{
    u64 end = sector + ((bytes + 511) >> 9);
    u64 first, last;
    u32 word, i, words;
    u64 *bits;

    // The part of the disk that is watched.
    if (end <= FIRST_SECTOR || sector >= FIRST_SECTOR + SECTORS)
        return;
    if (end > FIRST_SECTOR + SECTORS)
        end = FIRST_SECTOR + SECTORS;
    first = sector <= FIRST_SECTOR ? 0 : (sector - FIRST_SECTOR) >> GRANULE_SHIFT;
    last = (end - 1 - FIRST_SECTOR) >> GRANULE_SHIFT;
    word = first >> 6;
    words = (u32)(last >> 6) - word;
    if (words == 0) {
        bits = map_lookup(&live, &word);
        if (bits)
            __sync_fetch_and_or(bits, (~0ULL >> (63 - (last - first))) << (first & 63));
        else
            blind();
        return;
    }
    if (words >= WORDS_MAX) {
        blind();
        return;
    }
    for (i = 0; i < WORDS_MAX; i++) {
        u32 at = word + i;
        u64 set = ~0ULL;

        if (i > words)
            break;
        if (i == 0)
            set <<= first & 63;
        if (i == words)
            set &= ~0ULL >> (63 - (last & 63));
        bits = map_lookup(&live, &at);
        if (!bits) {
            blind();
            break;
        }
        __sync_fetch_and_or(bits, set);
    }
}

// The event comes before the data lands. Its sector counts from the begin of the disk, also for a write to a partition.
SEC("tp_btf/block_bio_queue")
int submitted(u64 *context)
{
    struct bio *bio = (struct bio *)context[0];

    if (!(bio->bi_opf & TO_DEVICE) || !is_ours(bio->bi_bdev->bd_disk))
        return 0;
    // A flush has no size.
    if (bio->bi_iter.bi_size)
        mark(bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
    return 0;
}

// Of drivers that take bios as they are. Some of them have used the iterator up by then; what such a one wrote was in flight
// until now, so whoever read the disk meanwhile must be told.
SEC("tp_btf/block_bio_complete")
int completed(u64 *context)
{
    struct bio *bio = (struct bio *)context[1];
    u32 operation = bio->bi_opf & OPERATION;

    if (!(operation & TO_DEVICE) || !is_ours(bio->bi_bdev->bd_disk))
        return 0;
    if (bio->bi_iter.bi_size)
        mark(bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
    return 0;
}

// Of drivers that make requests of bios, whole or in parts.
SEC("tp_btf/block_rq_complete")
int request_completed(u64 *context)
{
    struct request *request = (struct request *)context[0];
    u32 bytes = (u32)context[2];
    u32 operation = request->cmd_flags & OPERATION;

    if (!(operation & TO_DEVICE) || !is_ours(request->q->disk))
        return 0;
    if (operation == DRIVER_OUT)
        blind();
    else if (bytes)
        mark(request->__sector, bytes);
    return 0;
}

// The kernel lets only programs that are available under the GPL, too, look at its structures: this file is, as its first line
// says, and nothing else of the product is linked with it.
char LICENSE[] SEC("license") = "Dual MIT/GPL";
