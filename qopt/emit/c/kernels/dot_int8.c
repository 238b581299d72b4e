static int32_t dot_int8(const uint8_t *row, const uint8_t *column, int32_t taps)
{
    const int8_t *weights = (const int8_t *)row;
    int32_t sum = 0;
    for (int32_t i = 0; i < taps; i++) {
        sum += weights[i] * column[i];
    }
    return sum;
}
