/* output = zero_point + round((bias + sum of weight * code) * mantissa / 2^shift), clipped. The zero point of the input
   is part of the bias. Columns are gathered tile by tile; a row is unpacked once for a tile. */
static void run_layer(const struct layer *l, const uint8_t *in, uint8_t *codes, int32_t *wide, uint8_t *scratch)
{
    for (int32_t first = 0; first < l->pixels; first += l->tile) {
        int32_t pixels = l->pixels - first < l->tile ? l->pixels - first : l->tile;
        const uint8_t *columns = l->window ? scratch : in + first * l->taps;
        int32_t gathered = -1;
        for (int32_t p = 0; p < l->part_count; p++) {
            const struct rows *rows = &l->parts[p];
            for (int32_t r = 0; r < rows->count; r++) {
                int32_t channel = rows->channels ? rows->channels[r] : r;
                int32_t group = channel / l->group_channels;
                if (group != gathered) {
                    /*IF window*/
                    if (l->window) {
                        const struct window *w = l->window;
                        const uint8_t *planes = in + group * w->channels * w->height * w->width;
                        gather(w, planes, l->input_zero_point, first, pixels, scratch);
                    }
                    /*END*/
                    /*IF xnor*/
                    if (l->bit_bytes) {
                        pack_columns(columns, l->taps, pixels, scratch + l->column_bytes);
                    }
                    /*END*/
                    gathered = group;
                }
                const uint8_t *row = rows->packed + r * rows->row_bytes;
                /*IF unpack*/
                if (rows->unpack) {
                    int8_t *unpacked = (int8_t *)(scratch + l->column_bytes + l->bit_bytes);
                    rows->unpack(rows, row, l->taps, unpacked);
                    row = (const uint8_t *)unpacked;
                }
                /*END*/
                const uint8_t *column = columns;
                int32_t step = l->taps;
                /*IF xnor*/
                if (rows->counts_bits) {
                    column = scratch + l->column_bytes;
                    step = (l->taps + 31) / 32 * 4;
                }
                /*END*/
                for (int32_t pixel = 0; pixel < pixels; pixel++) {
                    int32_t sum = rows->bias[r] + rows->dot(row, column, l->taps);
                    int32_t value = round_shift((int64_t)sum * rows->mantissa[r], rows->shift[r]);
                    int32_t at = channel * l->channel_stride + (first + pixel) * l->pixel_stride;
                    store(codes, wide, at, finish(value, &l->code));
                    column += step;
                }
            }
        }
    }
}
