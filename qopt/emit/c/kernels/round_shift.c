/* product / 2^shift to nearest, halves away from zero, clipped to +-2^30. Rounds magnitudes, because C99 defines the
   right shift of negative numbers for no compiler. */
static int32_t round_shift(int64_t product, uint8_t shift)
{
    uint64_t magnitude = product < 0 ? (uint64_t)0 - (uint64_t)product : (uint64_t)product;
    magnitude = (magnitude + ((uint64_t)1 << (shift - 1))) >> shift;
    if (magnitude > (uint64_t)1 << 30) {
        magnitude = (uint64_t)1 << 30;
    }
    return product < 0 ? -(int32_t)magnitude : (int32_t)magnitude;
}
