/* A part of a box of codes, every step-th one, or the box with zeros around it. */
struct box {
    int32_t size[3], out[3], start[3], step[3];
};

static void run_move(const struct box *b, const uint8_t *in, uint8_t zero_point, uint8_t *out)
{
    for (int32_t i = 0; i < b->out[0]; i++) {
        int32_t plane = b->start[0] + i * b->step[0];
        for (int32_t j = 0; j < b->out[1]; j++) {
            int32_t y = b->start[1] + j * b->step[1];
            for (int32_t k = 0; k < b->out[2]; k++) {
                int32_t x = b->start[2] + k * b->step[2];
                int inside = plane >= 0 && plane < b->size[0] && y >= 0 && y < b->size[1] && x >= 0 && x < b->size[2];
                *out++ = inside ? in[(plane * b->size[1] + y) * b->size[2] + x] : zero_point;
            }
        }
    }
}
