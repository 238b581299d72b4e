/* Five digits of base 3 in a byte, lowest first, to the numbers they stand for. */
static void unpack_ternary(const struct rows *rows, const uint8_t *packed, int32_t taps, int8_t *row)
{
    uint32_t digits = 0;
    for (int32_t i = 0; i < taps; i++) {
        digits = i % 5 ? digits / 3 : *packed++;
        row[i] = rows->table[digits % 3];
    }
}
