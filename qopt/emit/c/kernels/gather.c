/* What the window sees at each of `pixels` output positions from `first` on: channels * kernel codes for each; over the
   border it sees zeros. */
static void gather(const struct window *w, const uint8_t *in, uint8_t zero_point, int32_t first, int32_t pixels,
                   uint8_t *columns)
{
    for (int32_t pixel = first; pixel < first + pixels; pixel++) {
        int32_t top = pixel / w->out_width * w->stride_height - w->pad_top;
        int32_t left = pixel % w->out_width * w->stride_width - w->pad_left;
        for (int32_t channel = 0; channel < w->channels; channel++) {
            const uint8_t *plane = in + channel * w->height * w->width;
            for (int32_t i = 0; i < w->kernel_height; i++) {
                int32_t y = top + i * w->dilation_height;
                for (int32_t j = 0; j < w->kernel_width; j++) {
                    int32_t x = left + j * w->dilation_width;
                    int inside = y >= 0 && y < w->height && x >= 0 && x < w->width;
                    *columns++ = inside ? plane[y * w->width + x] : zero_point;
                }
            }
        }
    }
}
