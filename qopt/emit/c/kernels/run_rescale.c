/* output = zero_point + round((code - input_zero_point) * mantissa / 2^shift), clipped; may work in place. */
static void run_rescale(const uint8_t *in, int32_t count, int32_t input_zero_point, int32_t mantissa, uint8_t shift,
                        const struct code *code, uint8_t *codes, int32_t *wide)
{
    for (int32_t i = 0; i < count; i++) {
        int64_t product = (int64_t)(in[i] - input_zero_point) * mantissa;
        store(codes, wide, i, finish(round_shift(product, shift), code));
    }
}
