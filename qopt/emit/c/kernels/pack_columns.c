/* Columns of codes 0 and 1 to bits, lowest first, in whole words of 4 bytes. */
static void pack_columns(const uint8_t *columns, int32_t taps, int32_t pixels, uint8_t *bits)
{
    int32_t bytes = (taps + 31) / 32 * 4;
    memset(bits, 0, (size_t)(pixels * bytes));
    for (int32_t pixel = 0; pixel < pixels; pixel++) {
        for (int32_t i = 0; i < taps; i++) {
            bits[i >> 3] = (uint8_t)(bits[i >> 3] | columns[i] << (i & 7));
        }
        columns += taps;
        bits += bytes;
    }
}
