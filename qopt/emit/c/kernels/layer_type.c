/* A convolution, or a matrix product where window is null. */
struct layer {
    const struct window *window;                /* of one group of the input */
    int32_t group_channels;                     /* output channels of a group */
    int32_t taps;                               /* weights of an output channel */
    int32_t pixels, tile;                       /* output positions, and how many are worked on at a time */
    int32_t channel_stride, pixel_stride;       /* in the output */
    uint8_t input_zero_point;
    int32_t column_bytes, bit_bytes;            /* scratch: columns, columns in bits, and one row behind them */
    struct code code;
    int32_t part_count;
    const struct rows *parts;
};
