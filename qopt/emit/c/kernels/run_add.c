/* output = zero_point + round(((a - zero_a) * mantissa_a + (b - zero_b) * mantissa_b) / 2^shift), clipped; may work in
   place. */
static void run_add(const uint8_t *a, int32_t zero_a, int32_t mantissa_a, const uint8_t *b, int32_t zero_b,
                    int32_t mantissa_b, uint8_t shift, int32_t count, const struct code *code, uint8_t *codes,
                    int32_t *wide)
{
    for (int32_t i = 0; i < count; i++) {
        int64_t sum = (int64_t)(a[i] - zero_a) * mantissa_a + (int64_t)(b[i] - zero_b) * mantissa_b;
        store(codes, wide, i, finish(round_shift(sum, shift), code));
    }
}
