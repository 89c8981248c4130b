/* Run a fuzz program over files and folders, with any compiler. Exit status 0: nothing was found. */
#define _GNU_SOURCE
#include "input.h"

#include <ftw.h>
#include <sys/stat.h>

static unsigned files;

static int replay(const char *path, const struct stat *info, int kind, struct FTW *walk)
{
    (void)walk;
    if (kind != FTW_F)
        return 0;
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(2);
    }
    /* Exactly as long as the input, so that reading behind it is seen. */
    size_t size = (size_t)info->st_size;
    uint8_t *data = malloc(size);
    if (fread(data, 1, size, file) != size) {
        perror(path);
        exit(2);
    }
    fclose(file);
    fprintf(stderr, "%s\n", path);
    LLVMFuzzerTestOneInput(data, size);
    free(data);
    files++;
    return 0;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (nftw(argv[i], replay, 16, FTW_PHYS) != 0) {
            perror(argv[i]);
            return 2;
        }
    }
    printf("%u files\n", files);
    return files == 0;
}
