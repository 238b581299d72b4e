/* Digits of 1 to 4 bits, lowest first, to the numbers they stand for. */
static void unpack_bits(const struct rows *rows, const uint8_t *packed, int32_t taps, int8_t *row)
{
    uint32_t mask = ((uint32_t)1 << rows->bits) - 1;
    uint32_t buffer = 0;
    int32_t have = 0;
    for (int32_t i = 0; i < taps; i++) {
        if (have < rows->bits) {
            buffer |= (uint32_t)*packed++ << have;
            have += 8;
        }
        row[i] = rows->table[buffer & mask];
        buffer >>= rows->bits;
        have -= rows->bits;
    }
}
