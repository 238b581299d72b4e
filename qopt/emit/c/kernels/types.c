/* Rows of weights of one format. Row i belongs to output channel channels[i], or i where channels is null. */
struct rows {
    int32_t count;
    const int32_t *channels; 
    const uint8_t *packed;                      /* row_bytes for each row */
    int32_t row_bytes;
    void (*unpack)(const struct rows *rows, const uint8_t *packed, int32_t taps, int8_t *row); /* or null */
    int32_t bits;                               /* of a digit */
    const int8_t *table;                        /* what a digit stands for */
    int32_t (*dot)(const uint8_t *row, const uint8_t *column, int32_t taps);
    int32_t counts_bits;                        /* the columns, too, have one bit for each tap */
    const int32_t *bias;
    const int32_t *mantissa;
    const uint8_t *shift;
};

/* Windows over planes of height x width. */
struct window {
    int32_t channels, height, width;
    int32_t out_height, out_width;
    int32_t kernel_height, kernel_width;
    int32_t stride_height, stride_width;
    int32_t dilation_height, dilation_width;
    int32_t pad_top, pad_left;
};

/* What output codes are clipped to after the zero point is added. */
struct code {
    int32_t zero_point, low, high;
};
