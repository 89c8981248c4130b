/* Fuzz input as a stream of small numbers. Beyond its end everything is 0. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct input {
    const uint8_t *at;
    size_t left;
};

static inline uint8_t in8(struct input *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->at++;
}

static inline uint16_t in16(struct input *in)
{
    uint16_t low = in8(in);
    return (uint16_t)(low | (uint16_t)(in8(in) << 8));
}

static inline uint32_t in32(struct input *in)
{
    uint32_t low = in16(in);
    return low | (uint32_t)in16(in) << 16;
}

static inline uint64_t in64(struct input *in)
{
    uint64_t low = in32(in);
    return low | (uint64_t)in32(in) << 32;
}

/* What must hold whatever the input is. */
#define MUST(condition)                                                                   \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: violated: %s\n", __FILE__, __LINE__, #condition);     \
            abort();                                                                      \
        }                                                                                 \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
