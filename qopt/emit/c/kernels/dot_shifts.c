/* Weights 2^s as s + 1, -2^s as -(s + 1), and 0. */
static int32_t dot_shifts(const uint8_t *row, const uint8_t *column, int32_t taps)
{
    const int8_t *weights = (const int8_t *)row;
    int32_t sum = 0;
    for (int32_t i = 0; i < taps; i++) {
        int32_t weight = weights[i];
        if (weight > 0) {
            sum += (int32_t)column[i] << (weight - 1);
        } else if (weight < 0) {
            sum -= (int32_t)column[i] << (-weight - 1);
        }
    }
    return sum;
}
