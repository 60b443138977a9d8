/* Renders the views of a file: render_file LEVEL IN OUT. IN has the noise levels, then for each view the number of bytes of its image, its
   record, and its image. Every buffer is an allocation of its own size, so that a sanitizer sees what is read and written around it. */

#include <stdio.h>

#include "_kernel.c"

int main(int argc, char **argv) {
    static uint8_t noise[3 * 65536];
    FILE *in = fopen(argv[2], "rb"), *to = fopen(argv[3], "wb");
    struct record view;
    int64_t bytes;
    if (argc != 4 || !in || !to || fread(noise, sizeof noise, 1, in) != 1) return 2;
    while (fread(&bytes, sizeof bytes, 1, in) == 1) {
        if (fread(&view, sizeof view, 1, in) != 1) return 2;
        int64_t size = 3ll * view.size * view.size, needed = scratch_bytes(&view, 1);
        uint8_t *image = malloc(bytes), *out = malloc(size), *scratch = aligned_alloc(64, needed);
        if (fread(image, bytes, 1, in) != 1) return 2;
        memset(scratch, 0xA5, needed);
        render(atoi(argv[1]), image, image + bytes, &view, 1, noise, scratch, &out);
        fwrite(out, size, 1, to);
        free(image), free(out), free(scratch);
    }
    return fclose(to);
}
