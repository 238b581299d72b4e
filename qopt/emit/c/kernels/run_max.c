/* The largest code of each window; may work in place where nothing is padded. */
static void run_max(const struct window *w, const uint8_t *in, uint8_t *out)
{
    for (int32_t channel = 0; channel < w->channels; channel++) {
        const uint8_t *plane = in + channel * w->height * w->width;
        for (int32_t pixel = 0; pixel < w->out_height * w->out_width; pixel++) {
            int32_t top = pixel / w->out_width * w->stride_height - w->pad_top;
            int32_t left = pixel % w->out_width * w->stride_width - w->pad_left;
            uint8_t largest = 0;
            for (int32_t i = 0; i < w->kernel_height; i++) {
                int32_t y = top + i * w->dilation_height;
                for (int32_t j = 0; j < w->kernel_width; j++) {
                    int32_t x = left + j * w->dilation_width;
                    if (y >= 0 && y < w->height && x >= 0 && x < w->width && plane[y * w->width + x] > largest) {
                        largest = plane[y * w->width + x];
                    }
                }
            }
            *out++ = largest;
        }
    }
}
