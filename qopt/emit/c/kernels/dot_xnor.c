/* How many of the first taps bits agree; behind them rows have ones and columns zeros. For codes x of 0 and 1 the sum of
   w x is this number plus the number of weights +1 minus taps, which the bias holds. */
static int32_t dot_xnor(const uint8_t *row, const uint8_t *column, int32_t taps)
{
    int32_t sum = 0;
    for (int32_t i = 0; i < taps; i += 32) {
        uint32_t weights, codes;
        memcpy(&weights, row + i / 8, 4);
        memcpy(&codes, column + i / 8, 4);
        uint32_t equal = ~(weights ^ codes);
        equal = equal - (equal >> 1 & 0x55555555u);
        equal = (equal & 0x33333333u) + (equal >> 2 & 0x33333333u);
        sum += (int32_t)(((equal + (equal >> 4)) & 0x0F0F0F0Fu) * 0x01010101u >> 24);
    }
    return sum;
}
