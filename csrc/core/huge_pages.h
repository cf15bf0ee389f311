// Large results in large pages. A fresh result of many megabytes is memory that the kernel maps page by page as it is
// written: at 4 KiB, the faults and the missing address translations cost as long as a good part of the arithmetic.
#pragma once

#include <cstddef>

namespace memad_fast {

// Asks for huge pages where the whole of one lies inside [data, data + bytes). A hint: it changes no content, and no
// more memory is mapped than would be. Does nothing for small results and where the system has no such pages.
void prefer_huge_pages(void* data, std::size_t bytes);

}  // namespace memad_fast
