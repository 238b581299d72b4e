/* Adds the zero point and clips, which is Relu and Clip as well. */
static int32_t finish(int32_t value, const struct code *code)
{
    value += code->zero_point;
    return value < code->low ? code->low : value > code->high ? code->high : value;
}
