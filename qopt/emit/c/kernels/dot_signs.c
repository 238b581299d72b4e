/* Weights +1 as a set bit and -1 as a clear one, lowest bit first. */
static int32_t dot_signs(const uint8_t *row, const uint8_t *column, int32_t taps)
{
    int32_t sum = 0;
    for (int32_t i = 0; i < taps; i++) {
        sum += row[i >> 3] >> (i & 7) & 1 ? column[i] : -(int32_t)column[i];
    }
    return sum;
}
