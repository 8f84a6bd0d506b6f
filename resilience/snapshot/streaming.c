/* Many blocks of memory, copied by one call around the processor's cache.
 *
 * A plain store first fetches the line that it is about to overwrite; a streaming one does not, which leaves two thirds
 * of the traffic. The C library does so, too, but only for single blocks that are larger than a good part of the cache.
 *
 * Nothing of Python is used: `streaming.py` loads this with ctypes, which gives up the interpreter lock for the call.
 * The name of the function carries the version of its arguments, so that a library left by an older package is not
 * taken for this one.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LINE 64           /* bytes of a cache line: what a streaming store has to fill for the processor to send it off */
#define AHEAD (16 * LINE) /* how far ahead is read: asking for memory that is not there does no harm */

#if defined(__SSE2__)
#include <emmintrin.h>

static void stream(unsigned char *to, const unsigned char *from, size_t bytes)
{
    const size_t head = (size_t)(-(uintptr_t)to) & (LINE - 1);

    memcpy(to, from, head);
    to += head, from += head, bytes -= head;
    for (; bytes >= LINE; to += LINE, from += LINE, bytes -= LINE) {
        const __m128i *source = (const __m128i *)from;
        __m128i *target = (__m128i *)to;

        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_NTA);
        const __m128i first = _mm_loadu_si128(source), second = _mm_loadu_si128(source + 1);
        const __m128i third = _mm_loadu_si128(source + 2), fourth = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, first);
        _mm_stream_si128(target + 1, second);
        _mm_stream_si128(target + 2, third);
        _mm_stream_si128(target + 3, fourth);
    }
    memcpy(to, from, bytes);
}

/* Streaming stores are not ordered with those that tell another thread that the copy is there. */
#define FINISH() _mm_sfence()
#else
#define stream memcpy
#define FINISH() ((void)0)
#endif

/* Copies `bytes[i]` bytes from address `from[i]` to address `to[i]`, for each i below `count`: around the cache if they
 * are `large` or more. Nothing may overlap. */
void resilience_copy_blocks_1(size_t count, const uint64_t *to, const uint64_t *from, const uint64_t *bytes,
                              uint64_t large)
{
    for (size_t i = 0; i < count; i++) {
        unsigned char *target = (unsigned char *)(uintptr_t)to[i];
        const unsigned char *source = (const unsigned char *)(uintptr_t)from[i];

        if (bytes[i] < large)
            memcpy(target, source, (size_t)bytes[i]);
        else
            stream(target, source, (size_t)bytes[i]);
    }
    FINISH();
}
