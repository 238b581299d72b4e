/* Writes a code of 8 bits, or of 32 where wide is not null. */
static void store(uint8_t *codes, int32_t *wide, int32_t at, int32_t value)
{
    if (wide) {
        wide[at] = value;
    } else {
        codes[at] = (uint8_t)value;
    }
}
