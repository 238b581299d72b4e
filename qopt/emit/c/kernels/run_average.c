/* output = zero_point + round(sum of (code - input_zero_point) * mantissa / 2^shift), clipped; mantissa and shift by the
   number of codes that the window sees, or the same for all windows. May work in place where nothing is padded. */
static void run_average(const struct window *w, const uint8_t *in, int32_t input_zero_point, const int32_t *mantissa,
                        const uint8_t *shift, int32_t by_number, const struct code *code, uint8_t *codes, int32_t *wide)
{
    int32_t at = 0;
    for (int32_t channel = 0; channel < w->channels; channel++) {
        const uint8_t *plane = in + channel * w->height * w->width;
        for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
            int32_t top = pixel / w->out_width * w->stride_height - w->pad_top;
            int32_t left = pixel % w->out_width * w->stride_width - w->pad_left;
            int32_t sum = 0, seen = 0;
            for (int32_t y = top; y < top + w->kernel_height; y++) {
                for (int32_t x = left; x < left + w->kernel_width; x++) {
                    if (y >= 0 && y < w->height && x >= 0 && x < w->width) {
                        sum += plane[y * w->width + x] - input_zero_point;
                        seen++;
                    }
                }
            }
            int32_t entry = by_number ? seen - 1 : 0;
            store(codes, wide, at++, finish(round_shift((int64_t)sum * mantissa[entry], shift[entry]), code));
        }
    }
}
